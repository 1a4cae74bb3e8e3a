"""The commands as a user types them: with and without data, right and wrong."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, needs_gpu, run_main, train_tiny

import main


def one_line_error(done, code=2):
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if "cpp_extension" not in line]  # notices of torch
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.txt").write_bytes(b"to be or not to be, that is the question. " * 30)
    (folder / "validation.txt").write_bytes(b"whether 'tis nobler in the mind to suffer. " * 5)
    run_dir, _ = train_tiny(folder, "--max_steps=5")
    return folder, run_dir


def test_an_empty_folder_trains_on_the_starter_corpus(tmp_path):
    _, console = train_tiny(tmp_path, "--max_steps=3")
    assert "wrote train.txt" in console
    assert "wrote validation.txt" in console
    written = {name: (tmp_path / name).read_bytes() for name in ("train.txt", "validation.txt")}
    assert len(written["train.txt"]) > 500_000
    _, console = train_tiny(tmp_path, "--max_steps=1")
    assert "wrote" not in console
    assert written == {name: (tmp_path / name).read_bytes() for name in written}


def test_a_text_of_ones_own_is_held_out_from_and_left_alone(tmp_path):
    (tmp_path / "train.txt").write_bytes(bytes(range(256)) * 8)
    _, console = train_tiny(tmp_path, "--max_steps=2")
    assert "last 5 % of train.txt" in console
    assert {p.name for p in tmp_path.iterdir()} == {"train.txt", "runs"}
    assert (tmp_path / "train.txt").read_bytes() == bytes(range(256)) * 8


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--model_dmi", "64"], "unrecognized arguments: --model_dmi 64; see --help"),
        (["genrate"], "unrecognized arguments: genrate; see --help"),
        (["--max_steps", "many"], "max_steps"),
        (["--max_steps", "0"], "max_steps=0 is not possible: it must be above 0"),
        (["--compile", "maybe"], "compile"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--num_heads", "5"], "num_heads=5"),
        (["--max_length", "5000"], "max_length=5000 is not possible: it must be at most rope_max_length_buffer=4096"),
        (
            ["--remasking", "magic"],
            "remasking='magic' is not possible: it must be one of low_confidence, random",
        ),
        (["--dropout", "1"], "dropout=1.0"),
        (["--device", "tpu"], "device='tpu'"),
        (["--amp_dtype", "int8"], "amp_dtype='int8'"),
        (["--name", "../up"], "name='../up'"),
        (["--train_data_file", "nowhere.txt"], "nowhere.txt: is missing"),
        (["--validation_data_file", "typo.txt"], "typo.txt: is missing"),
        (["--conv_width", "4"], "conv_width=4 is not possible: it must be odd"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "nowhere"], "nowhere"),
        (["generate", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["generate"], "train one first"),
        (["generate", "--temprature", "1"], "--temprature"),
        (["evaluate", "--checkpoint", "."], "latest.pt"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert main.main(flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (tmp_path / "runs").exists()


def test_another_training_text_is_not_validated_on_the_validation_text_lying_about(text_folder):
    (text_folder / "mine.txt").write_bytes(bytes(range(256)) * 8)
    _, console = train_tiny(text_folder, "--max_steps=2", "--train_data_file=mine.txt")
    assert "last 5 % of mine.txt" in console
    _, console = train_tiny(text_folder, "--max_steps=2")
    assert "held out" not in console


def test_a_validation_text_that_was_named_is_used_whatever_its_name(text_folder):
    (text_folder / "mine.txt").write_bytes(bytes(range(256)) * 8)
    flags = ["--max_steps=2", "--train_data_file=mine.txt", "--validation_data_file=validation.txt"]
    _, console = train_tiny(text_folder, *flags)
    assert "held out" not in console
    assert "validation  validation.txt" in console


def test_a_replaced_training_text_beside_the_starter_validation_text_is_warned_of(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"my own text " * 200)
    (tmp_path / "validation.txt").write_bytes(main.STARTER_LINE + b"Text. " * 20)
    _, console = train_tiny(tmp_path, "--max_steps=1")
    assert "warning: validation.txt is the starter corpus" in console


def test_train_may_be_said(text_folder, monkeypatch):
    monkeypatch.chdir(text_folder)
    assert main.main(["train", *TINY_FLAGS, "--max_steps=1", "--num_samples=0"]) == 0


def test_a_mistake_ends_the_process_with_code_2(tmp_path):
    assert "unrecognized arguments: --bogus" in one_line_error(run_main(tmp_path, "--bogus"))
    assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_the_context_is_refused_with_both_sizes(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"too short")
    (tmp_path / "validation.txt").write_bytes(b"long enough, this one")
    message = one_line_error(run_main(tmp_path, *TINY_FLAGS))
    assert "train.txt: 9 bytes" in message
    assert "max_length=16" in message


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(main.CONFIG):
        assert re.search(rf"--{field.name} \[?[A-Z]+\]? (?:(?!\(default).){{10,}}\(default: ", text), field.name


def test_every_field_can_be_set_by_its_flag():
    parser = main.OneLineParser("", "")
    main.add_config_flags(parser)
    for field in dataclasses.fields(main.CONFIG):
        value = {int: 7, float: 0.25, bool: False, str: "word"}[field.type]
        assert vars(parser.parse_args([f"--{field.name}={value}"])) == {field.name: value}


def test_config_refuses_wrong_types_and_unknown_names():
    for overrides in ({"max_steps": "5"}, {"max_steps": True}, {"max_steps": 2.5}, {"dropout": "0"}, {"name": 3}):
        (name,) = overrides
        with pytest.raises(main.InputError, match=f"^{name}="):
            main.CONFIG(**overrides)
    with pytest.raises(TypeError):
        main.CONFIG(model_dmi=3)


def test_config_takes_the_size_of_its_device_where_nothing_is_set():
    assert main.CONFIG(device="cpu").model_dim == 128
    assert main.CONFIG(device="cpu", model_dim=64).model_dim == 64


def test_generate_continues_a_prompt_and_fills_a_hole(trained, monkeypatch, capsys):
    folder, run_dir = trained
    done = run_main(folder, "generate", "--prompt", "to be", "--response_length", "6", "--suffix", " be.", "--watch")
    assert done.returncode == 0, done.stderr
    assert str(run_dir.relative_to(folder)) in done.stderr
    text = done.stdout
    assert text.startswith("to be")
    assert text.endswith(" be.\n")
    assert "\x1b" not in done.stdout  # no terminal
    monkeypatch.chdir(folder)
    printed = lambda *arguments: main.main(["generate", *arguments]) or capsys.readouterr().out
    assert printed("--prompt", "to be", "--response_length", "6", "--suffix", " be.") == text
    unprompted = printed("--checkpoint", str(run_dir), "--seed", "3")
    assert not unprompted.startswith("\n\n"), "the empty line it follows is not printed"
    assert printed("--prompt", "", "--seed", "3") != unprompted


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--samples", "0"], "samples=0"),
        (["--prompt", "x" * 16], "prompt='16 bytes'"),
        (["--top_p", "1.5"], "top_p=1.5"),
        (["--response_length", "-3"], "response_length=-3"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_in_one_line(trained, flags, named):
    folder, _ = trained
    assert named in one_line_error(run_main(folder, "generate", *flags))


def test_holes_in_a_prompt_are_filled_and_several_samples_differ(trained):
    folder, _ = trained
    done = run_main(folder, "generate", "--prompt", "be{3}not{2}", "--samples", "3", "--top_p", "1")
    assert done.returncode == 0, done.stderr
    assert main.holes_to_masks("be{3}not{2}") == [[*b"be", *[main.MASK] * 3, *b"not", *[main.MASK] * 2]]
    assert main.holes_to_masks("{} {a}") == [list(b"{} {a}")]
    parts = re.split(r"--- seed (\d+)\n", done.stdout)
    assert parts[1::2] == ["0", "1", "2"]
    assert len(set(parts[2::2])) == 3
    for text in parts[2::2]:
        assert text.startswith("be")
        assert "not" in text
    done = run_main(folder, "generate", "--prompt", "to {2-3}")
    assert done.returncode == 2
    assert "error: prompt='a hole of unknown length' is not possible: it must be followed by text" in done.stderr
    done = run_main(folder, "generate", "--prompt", "to be", "--samples", "2", "--response_length", "4")
    assert re.findall("--- seed .", done.stdout) == ["--- seed 0", "--- seed 1"]


def test_evaluate_prints_the_same_table_for_the_same_seed_and_keeps_bound_and_exact_apart(trained):
    folder, run_dir = trained
    options = ["evaluate", "--chunks", "3", "--temperature", "1"]
    done = run_main(folder, *options)
    assert done.returncode == 0, done.stderr
    model, config, _ = main.load_checkpoint(run_dir, device="cpu")
    dataset = main.ByteLevelTextDataset(folder / "validation.txt", config.max_length)
    bound, error = main.estimate_nelbo(model, dataset)
    head, first, *_ = done.stdout.splitlines()
    assert first.split()[:4] == ["NELBO", f"{bound:.3f}", "±", f"{error:.3f}"]
    (exact,) = [line for line in done.stdout.splitlines() if line.startswith("left to right  ")]
    number = re.search(r"\d\.\d{3}", exact)
    assert number.start() == head.index("exact")
    figures = json.loads(run_main(folder, *options, "--json").stdout)
    values = {row["figure"]: row["value"] for row in figures}
    assert values["NELBO"] == bound
    assert f"{values['left to right']:.3f}" == number.group()
    assert {
        "most confident first",
        "holes, greedy",
        "known words, free",
        "copied, prompted",
    } <= values.keys()
    refused = run_main(folder, "evaluate", "--seed", "-1")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "error: seed=-1 is not possible: it must be 0 to 2^63 - 1"
    early = run_dir / "early.pt"
    torch.save(main.read_checkpoint(run_dir / "latest.pt") | {"step": 2}, early)
    options = ["--chunks", "3", "--max_length", "8", "--file", "train.txt", "--json", "--checkpoint", str(early)]
    other = run_main(folder, "evaluate", *options)
    assert json.loads(other.stdout)[0]["value"] != bound


def test_evaluate_prints_nothing_but_json_where_the_validation_text_is_held_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.txt").write_bytes(b"to be or not to be, that is the question. " * 30)
    train_tiny(tmp_path, "--max_steps=1")
    monkeypatch.chdir(tmp_path)
    assert main.main(["evaluate", "--json", "--chunks=2"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)[0]["figure"] == "NELBO"
    assert "held out" in output.err


def test_evaluate_prints_its_figures_where_it_may_not_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.txt").write_bytes(b"to be or not to be, that is the question. " * 30)
    train_tiny(tmp_path, "--max_steps=1")
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", refuse)
    assert main.main(["evaluate", "--json", "--chunks=2"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)[0]["figure"] == "NELBO"


@needs_gpu
@pytest.mark.parametrize("block_length", [0, 1, 4])
def test_a_gpu_trains_evaluates_and_generates(text_folder, monkeypatch, capsys, block_length):
    train_tiny(text_folder, "--device=cuda", "--max_steps=2", f"--block_length={block_length}")
    monkeypatch.chdir(text_folder)
    assert main.main(["evaluate", "--chunks=2", "--device=cuda"]) == 0
    assert main.main(["generate", "--prompt=to be", "--device=cuda"]) == 0
    assert "left to right" in capsys.readouterr().out


def test_profile_reports_speed_fraction_of_the_ceiling_and_where_the_time_goes(text_folder):
    done = run_main(text_folder, "profile", *TINY_FLAGS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"[\d,]+ bytes/s, .* GFLOP/s, \d+% of", done.stdout)
    parts = ["data", "masks", "layout", "embedding", "convolution", "attention", "feed-forward", "norms"]
    parts += ["head and loss", "clipping", "Muon", "AdamW", "EMA", "rest"]
    rows = re.findall(r"^([a-zA-Z -]+?) +(\d+\.\d+) +(\d+\.\d+) +(\d+\.\d)%$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == parts
    assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=1)
    for name, forward, backward, _ in rows:
        assert float(forward) > 0, name
        has_weights = name in ("embedding", "convolution", "attention", "feed-forward", "norms", "head and loss")
        assert (float(backward) > 0) == has_weights or name == "rest", name
    (trace,) = text_folder.glob("runs/*/trace.json")
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("attention", ["simplified_mla", "mla", "mha"])
def test_the_flop_count_is_the_usual_formula(attention):
    """6 for each weight of a matrix product and byte, 12 L D for each layer's attention (PaLM, arXiv 2204.02311)."""
    config = main.CONFIG(**TINY, attention=attention)
    model = main.MaskPredictor(config)
    x0 = torch.zeros(3, config.max_length, dtype=torch.int64)
    counted = main.count_flops(lambda: main.masked_diffusion_loss(model, x0).backward())
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention_flops = 12 * config.num_layers * config.max_length * config.model_dim
    assert counted == 3 * config.max_length * (6 * weights + attention_flops)


def test_profile_of_several_processes_is_refused(text_folder):
    done = run_main(text_folder, "profile", *TINY_FLAGS, RANK="0", WORLD_SIZE="2", MASTER_PORT="1")
    assert "without torchrun" in one_line_error(done)


def test_a_missing_tensorboard_is_one_line_before_anything_is_compiled(text_folder, monkeypatch, capsys):
    monkeypatch.chdir(text_folder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(main, "compile_loss", lambda *_: 1 / 0)
    assert main.main(TINY_FLAGS) == 2
    assert "pip install --upgrade -r requirements.txt" in capsys.readouterr().err


def test_importing_main_does_nothing(tmp_path):
    import subprocess

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; s = torch.get_rng_state(); import main; " + (
        "assert torch.equal(s, torch.get_rng_state()); assert 'tensorboard' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_special_ids_are_those_of_the_design():
    assert (main.PAD, main.MASK, main.UNK) == (256, 257, 258)
