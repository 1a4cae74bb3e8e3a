"""Faults that users of comparable trainers met, each as they met it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, random_model, run_main, train_tiny

import main


def test_a_resumed_run_notices_that_its_texts_are_others_now(text_folder, monkeypatch, capsys):
    run_dir, _ = train_tiny(text_folder, "--max_steps=4", "--num_samples=0")
    before = main.read_checkpoint(run_dir / "best.pt")["step"], main.read_checkpoint(run_dir / "best.pt")["best_bound"]
    monkeypatch.chdir(text_folder)
    assert main.main(["--resume", "auto", "--max_steps=6"]) == 0
    assert "another" not in capsys.readouterr().out
    for name in ("train.txt", "validation.txt"):
        (text_folder / name).write_bytes("他说今天天气很好，我们去公园。".encode() * 60)
    assert main.main(["--resume", "auto", "--max_steps=10"]) == 0
    console = capsys.readouterr().out
    for kind, name in (("training", "train.txt"), ("validation", "validation.txt")):
        assert f"warning: {name} is another {kind} text than before; best bound and best.pt begin anew" in console
    after = main.read_checkpoint(run_dir / "best.pt")
    assert after["step"] == 10 > before[0]
    assert after["best_bound"] != before[1]


def test_a_text_is_known_by_its_size_and_by_any_change_of_a_small_one(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(1000))
    identity = main.ByteLevelTextDataset(path, 16).identity()
    assert identity == main.ByteLevelTextDataset(path, 16).identity()
    for changed in (bytes(999), b"a" + bytes(999), bytes(999) + b"a"):
        path.write_bytes(changed)
        assert main.ByteLevelTextDataset(path, 16).identity() != identity


def test_a_cache_folder_that_cannot_be_made_is_one_warning(text_folder):
    flags = [flag for flag in TINY_FLAGS if "compile" not in flag]
    done = run_main(text_folder, *flags, "--max_steps=2", "--num_samples=0", TORCHINDUCTOR_CACHE_DIR="/proc/nope")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("warning: torch.compile does not work here") == 1
    assert "final bound" in done.stdout


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("torch.compile is not supported on Python 3.15+"),
        PermissionError(13, "Permission denied", "/tmp/kernel.so"),
        OSError(28, "No space left on device"),
    ],
)
def test_whatever_torch_compile_lacks_is_one_warning(text_folder, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", refuse)
    _, console = train_tiny(text_folder, "--max_steps=2", "--compile=true", "--num_samples=0")
    assert f"warning: torch.compile does not work here ({type(error).__name__}: {error}" in console


def test_a_run_can_be_judged_away_from_its_texts(text_folder, tmp_path, monkeypatch, capsys):
    run_dir, _ = train_tiny(text_folder, "--max_steps=2", "--num_samples=0")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.txt").write_bytes(b"some other text " * 40)
    monkeypatch.chdir(elsewhere)
    assert main.main(["evaluate", "--checkpoint", str(run_dir), "--chunks=2"]) == 0, "found where the run was started"
    for name in ("train.txt", "validation.txt"):
        (text_folder / name).rename(text_folder / f"moved_{name}")
    capsys.readouterr()
    assert main.main(["evaluate", "--checkpoint", str(run_dir), "--chunks=2", "--json", "--file=other.txt"]) == 0
    output = capsys.readouterr()
    assert output.err.count("notice:") == 1
    rows = {row["figure"]: row for row in json.loads(output.out)}
    for name in ("known words, free", "copied, free"):
        assert rows[name]["value"] is None
        assert rows[name]["text"] is None
    assert rows["NELBO"]["value"] > 0
    assert main.main(["evaluate", "--checkpoint", str(run_dir), "--chunks=2"]) == 2
    error = capsys.readouterr().err
    assert str(text_folder) in error
    assert "--file" in error


@pytest.mark.parametrize(
    "content, word",
    [
        ("To be, or not to be. ".encode("utf-16") * 40, "UTF-16"),
        ("To be, or not to be. ".encode("utf-16-le") * 40, "UTF-16"),
        (b"\x1f\x8b\x08" + np.random.default_rng(0).bytes(900), "gunzip"),
        (b"PK\x03\x04" + np.random.default_rng(0).bytes(900), "unzip"),
        ("Grüße, Ärger, Öl. ".encode("latin-1") * 60, "iconv"),
    ],
)
def test_a_text_that_is_no_plain_text_is_used_with_one_warning_that_says_how_to_convert_it(text_folder, content, word):
    (text_folder / "train.txt").write_bytes(content)
    _, console = train_tiny(text_folder, "--max_steps=1", "--num_samples=0")
    (warning,) = [line for line in console.splitlines() if line.startswith("warning: train.txt looks like")]
    assert word in warning


@pytest.mark.parametrize("text", ["plain", "日本語の文章。", "é" * 10])
def test_plain_text_of_any_script_is_no_cause_for_a_warning(text):
    assert main.what_it_looks_like((text * 50).encode()) is None


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_else(text_folder, monkeypatch, capsys):
    monkeypatch.chdir(text_folder)
    (text_folder / "runs").write_text("a file")
    assert main.main(["profile", *TINY_FLAGS]) == 2
    assert "error: runs: cannot be written, as " in capsys.readouterr().err.splitlines()[-1]
    assert main.main(TINY_FLAGS) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: runs: cannot be written, as ")
    assert "is no folder" in output.err
    assert "model " not in output.out


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--compile=0"], False),
        (["--compile", "no"], False),
        (["--compile"], True),
        (["--compile", "1"], True),
        (["--compile=yes"], True),
    ],
)
def test_every_usual_way_to_say_yes_or_no_is_understood(flags, expected):
    parser = main.OneLineParser("test", "")
    main.add_config_flags(parser)
    assert parser.parse_args(flags).compile is expected


def test_no_file_is_left_open(text_folder):
    code = "import main, gc; d = main.ByteLevelTextDataset('train.txt', 16); del d; gc.collect()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code],
        cwd=text_folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ResourceWarning" not in done.stderr


class CertainOfWhatItSees(torch.nn.Module):
    """Predicts 'a' the more surely the more bytes are in view: so the mask ratio explains most of the cross-entropy."""

    block_length, fills_holes = 0, True

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, **_):
        n = self.block_length or tokens.shape[1]
        visible = (tokens != main.MASK).double().unflatten(1, (-1, n)).mean(dim=-1).repeat_interleave(n, dim=1)
        logits = torch.zeros(*tokens.shape, 256, dtype=torch.double)
        logits[..., ord("a")] = 6 * visible
        return logits.float()


@pytest.mark.parametrize("n", [0, 4])
def test_the_standard_error_of_a_bound_is_the_spread_over_disjoint_texts(tmp_path, n):
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_bytes(rng.choice(np.frombuffer(b"a" * 39 + b"b", np.uint8), 16 * 64 * 60).tobytes())
    model, bounds, errors = CertainOfWhatItSees(), [], []
    model.block_length = n
    for i in range(60):
        dataset = main.ByteLevelTextDataset(tmp_path / "text.txt", 16, start=i * 1024, stop=(i + 1) * 1024)
        bound, error = main.estimate_nelbo(model, dataset, seed=i)
        bounds.append(bound)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(bounds), rel=0.25)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_the_smallest_top_p_is_the_most_probable_byte(n):
    config = main.CONFIG(**{**TINY, "block_length": n, "temperature": 1.0})
    model, texts = random_model(config), {}
    for top_p in (1e-6, 0.5, 0.9):
        settings = dataclasses.replace(config, top_p=top_p)
        texts[top_p] = main.run_conditional_diffusion_inference(model, "a", 30, settings)
    greedy = dataclasses.replace(config, temperature=0.0)
    assert texts[1e-6] == main.run_conditional_diffusion_inference(model, "a", 30, greedy)
    assert len(set(texts.values())) == 3


def test_an_error_whose_text_holds_another_word_is_not_explained_away(text_folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("cannot read runs/gloomy_x")

    monkeypatch.chdir(text_folder)
    monkeypatch.setattr(main, "train", fail)
    with pytest.raises(RuntimeError, match="gloomy"):
        main.main(TINY_FLAGS)


def test_a_batch_goes_to_a_gpu_as_one_byte_for_each_byte(text_folder):
    dataset = main.ByteLevelTextDataset(text_folder / "train.txt", 16)
    assert dataset.random_crops(0, 0, slice(0, 2), 4).dtype == torch.uint8


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\frac{{1}}{{2}}", rb"\frac{1}{2}"),
        ("[a-z]{{3}}", b"[a-z]{3}"),
        ("a{2}b", [97, main.MASK, main.MASK, 98]),
        ("{x} { }", b"{x} { }"),
    ],
)
def test_doubled_braces_are_braces_and_no_hole(text, expected):
    assert main.holes_to_masks(text) == [list(expected)]


def test_half_a_character_in_a_prompt_is_one_line(model, config):
    with pytest.raises(main.InputError, match="prompt: '.ud800' is half a character"):
        main.run_conditional_diffusion_inference(model, "a\ud800", 4, config)


def test_seeds_that_differ_in_their_high_bits_give_other_weights():
    weights = [
        main.TrainingState(main.CONFIG(**TINY, seed=seed)).model.tok_embeddings.weight for seed in (0, 2**32, 2**40)
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_logged_loss_is_the_mean_of_all_steps_since_the_last_point(text_folder, monkeypatch):
    from conftest import read_scalars

    seen, original = [], main.masked_diffusion_loss
    monkeypatch.setattr(main, "masked_diffusion_loss", lambda *a: seen.append(original(*a)) or seen[-1])
    run_dir, _ = train_tiny(text_folder, "--max_steps=20", "--log_every=10", "--num_samples=0")
    logged = read_scalars(run_dir)["train/loss"]
    assert logged[10] == pytest.approx(sum(seen[:10]).item() / 10, rel=1e-5)
    assert logged[20] == pytest.approx(sum(seen[10:]).item() / 10, rel=1e-5)


def test_only_the_training_writes_events(text_folder, monkeypatch):
    run_dir, _ = train_tiny(text_folder, "--max_steps=2", "--num_samples=0")
    monkeypatch.chdir(text_folder)
    before = sorted(run_dir.iterdir())
    assert main.main(["evaluate", "--chunks=2"]) == 0
    assert sorted(run_dir.iterdir()) == before


def test_joiners_of_scripts_and_emoji_are_shown_and_overrides_are_not():
    family, persian = "👩\u200d👩\u200d👧", "می\u200cخواهم"
    assert main.printable(f"{family} {persian} co\u00adop".encode()) == f"{family} {persian} co\u00adop"
    assert main.printable("a\u202eb\u2066c\x1b[2J".encode()) == "a\ufffdb\ufffdc\ufffd[2J"


def test_what_goes_to_a_file_or_pipe_is_utf8_whatever_the_console_speaks(text_folder):
    train_tiny(text_folder, "--max_steps=1", "--num_samples=0")
    command = [sys.executable, str(ROOT / "main.py"), "generate", "--prompt", "日本語 é", "--response_length=1"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=text_folder, env=environment, capture_output=True, check=True)
    assert done.stdout.startswith("日本語 é".encode())


def test_a_model_in_half_precision_samples():
    config = main.CONFIG(**{**TINY, "block_length": 4})
    for dtype in (torch.bfloat16, torch.float64):
        model = random_model(config).to(dtype)
        assert main.run_conditional_diffusion_inference(model, "a", 8, config)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_ends_a_run_as_sigterm_does(text_folder):
    command = [sys.executable, str(ROOT / "main.py"), *TINY_FLAGS, "--max_steps=100000", "--num_samples=0"]
    process = subprocess.Popen(command, cwd=text_folder, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGHUP)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGHUP
    assert "and saved" in output
    assert list(text_folder.glob("runs/*/latest.pt"))


def test_a_checkpoint_held_by_another_program_for_a_moment_is_saved_all_the_same(tmp_path, monkeypatch):
    state, calls, original = main.TrainingState(main.CONFIG(**TINY)), [], os.replace

    def held(source, target):
        calls.append(target)
        if len(calls) < 3:
            raise PermissionError("held by a virus scanner")
        original(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert main.save_checkpoint(tmp_path / "renamed_meanwhile", "latest.pt", state)
    assert main.read_checkpoint(tmp_path / "renamed_meanwhile" / "latest.pt")["step"] == 0


@pytest.mark.parametrize("flag", ["--num_heads=1", "--block_length=8", "--rope_theta=100"])
def test_what_defines_the_model_does_not_change_on_resume(text_folder, monkeypatch, capsys, flag):
    train_tiny(text_folder, "--max_steps=1", "--num_samples=0")
    monkeypatch.chdir(text_folder)
    assert main.main(["--resume", "auto", "--max_steps=2", flag]) == 2
    name = flag[2:].split("=")[0]
    assert f"error: {name}=" in capsys.readouterr().err


def test_a_resumed_run_s_config_json_says_what_it_was_resumed_with(text_folder, monkeypatch):
    run_dir, _ = train_tiny(text_folder, "--max_steps=1", "--num_samples=0")
    monkeypatch.chdir(text_folder)
    assert main.main(["--resume", "auto", "--max_steps=3"]) == 0
    assert json.loads((run_dir / "config.json").read_text())["max_steps"] == 3


@pytest.mark.parametrize("environment", [{"RANK": "0"}, {"RANK": ""}])
def test_a_left_over_rank_is_no_torchrun(text_folder, environment):
    done = run_main(text_folder, *TINY_FLAGS, "--max_steps=1", "--num_samples=0", **environment)
    assert done.returncode == 0, done.stderr


def test_evaluate_prints_its_figures_where_there_is_no_standard_error(text_folder):
    train_tiny(text_folder, "--max_steps=1", "--num_samples=0")
    command = f"'{sys.executable}' '{ROOT / 'main.py'}' evaluate --chunks 2 2>&-"
    done = subprocess.run(command, shell=True, cwd=text_folder, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert "NELBO" in done.stdout


def test_a_single_chunk_has_no_error_and_says_so(tmp_path, config):
    (tmp_path / "text.txt").write_bytes(bytes(16))
    model = random_model(config)
    assert math.isnan(main.estimate_nelbo(model, main.ByteLevelTextDataset(tmp_path / "text.txt", 16))[1])
    assert main.with_error(1.5, math.nan) == "1.500"
    assert main.with_error(1.5, 0.25) == "1.500 ± 0.250"


def test_a_run_with_its_best_checkpoint_alone_is_a_run(text_folder, monkeypatch, capsys):
    run_dir, _ = train_tiny(text_folder, "--max_steps=2", "--num_samples=0")
    (run_dir / "latest.pt").unlink()
    monkeypatch.chdir(text_folder)
    assert main.main(["generate", "--response_length=2"]) == 0
    assert main.main(["--resume", "auto", "--max_steps=3"]) == 0


def test_a_prompt_that_begins_with_a_dash_is_told_how_to_be_written(capsys):
    assert main.main(["generate", "--prompt", "-item"]) == 2
    assert "--prompt=-" in capsys.readouterr().err


def test_runs_begun_in_the_same_second_by_several_processes_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.Path, "exists", lambda _: False)  # each looks before the other has made its folder
    folders = {main.make_run_dir(main.CONFIG(**TINY)) for _ in range(3)}
    assert len(folders) == 3


def test_a_run_resumed_elsewhere_still_knows_where_its_texts_are(text_folder, tmp_path, monkeypatch, capsys):
    run_dir, _ = train_tiny(text_folder, "--max_steps=1", "--num_samples=0")
    for name, max_steps in (("one", 2), ("two", 3)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert main.main(["--resume", str(run_dir), f"--max_steps={max_steps}", "--num_samples=0"]) == 0
    assert main.read_checkpoint(run_dir / "latest.pt")["folder"] == str(text_folder)


def test_a_checkpoint_of_an_older_file_takes_the_defaults_of_what_it_does_not_know(config):
    saved = {"config": {"device": "cpu", "model_dim": 64}}
    assert main.saved_config(saved, device="cpu").ffn_dim == main.CONFIG(device="cpu").ffn_dim


def test_a_bin_without_a_chunk_has_no_figure():
    nothing = torch.zeros(0, dtype=torch.double)
    assert all(math.isnan(number) for number in main.mean_over_bytes(nothing, nothing))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_signal_that_is_ignored_as_by_nohup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with main.stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_text_cut_into_chunks_that_blocks_do_not_divide_is_refused(text_folder, monkeypatch, capsys):
    train_tiny(text_folder, "--max_steps=1", "--num_samples=0", "--block_length=4")
    monkeypatch.chdir(text_folder)
    assert main.main(["evaluate", "--max_length=10", "--chunks=2"]) == 2
    assert "error: block_length=4 is not possible: it must be a divisor of 10 bytes" in capsys.readouterr().err
