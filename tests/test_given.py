"""What a command is given it uses, refuses or says; what stops it loses nothing; what it prints can be read."""

import contextlib
import dataclasses
import errno
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, random_model, run_main, train_tiny

import main

HOLE = [main.MASK]


@pytest.fixture
def run_dir(text_folder, monkeypatch):
    """A small model of blocks, trained a moment, in the current folder."""
    run_dir, _ = train_tiny(text_folder, "--max_steps=2", "--num_samples=0")
    monkeypatch.chdir(text_folder)
    return run_dir


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f({3}}})", [*b"f(", *HOLE * 3, *b"})"]),
        ("{{{2} x", [*b"{", *HOLE * 2, *b" x"]),
        ('{{"n": {2}}}', [*b'{"n": ', *HOLE * 2, *b"}"]),
        (r"a\n\tb\\n", [*b"a\n\tb\\n"]),
        ("{{4}}, {{2,12}}, {{2-12}}", [*b"{4}, {2,12}, {2-12}"]),
        ("{} {a} {a1} } {", [*b"{} {a} {a1} } {"]),
    ],
)
def test_holes_stand_beside_braces_and_ends_of_lines_are_understood(text, expected):
    assert main.holes_to_masks(text) == [expected]


@pytest.mark.parametrize("text", ["f({2-4}}})", "{{{2-4} x", '{{"n": {2-4}}}'])
def test_holes_of_unknown_length_stand_beside_braces_too(text):
    assert main.holes_to_masks(text) == [main.holes_to_masks(text.replace("2-4", str(n)))[0] for n in (2, 3, 4)]


@pytest.mark.parametrize("wrong", ["{0}", "{2,12}", "{0-3}", "{2-10000}", "{10000}", "{5-2}", "{2 - 4}", "{1-200}"])
def test_what_looks_like_a_hole_and_is_none_is_refused_with_the_right_way_to_write_it(run_dir, capsys, wrong):
    for arguments in (["--prompt", f"a {wrong} b"], ["--prompt", "a", "--suffix", f"{wrong} b"]):
        assert main.main(["generate", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {arguments[-2][2:]}={wrong!r} is not possible: it must be ")


def test_a_prompt_from_the_standard_input_is_taken_as_it_is(run_dir):
    text = r"\frac{1}{2} {{x}}"
    command = [sys.executable, str(ROOT / "main.py"), "generate", "--prompt", "-", "--response_length=3"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(text)


def test_a_prompt_from_a_closed_standard_input_is_one_line(run_dir):
    shell = f"'{sys.executable}' '{ROOT / 'main.py'}' generate --prompt - <&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: [Errno 9] Bad file descriptor"


def test_samples_of_a_validation_that_are_written_in_parts_stand_beside_their_own_truth(text_folder, monkeypatch):
    one, _ = train_tiny(text_folder, "--max_steps=1", "--num_samples=5")
    monkeypatch.setattr(main, "BYTES_AT_ONCE", 32)
    parts, _ = train_tiny(text_folder, "--max_steps=1", "--num_samples=5")
    shown = [re.findall(r"(?:model|truth)\n\n(.*)\n", (run / "samples.txt").read_text("utf-8")) for run in (one, parts)]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 10


def test_two_holes_of_unknown_length_and_one_that_nothing_follows_are_refused_before_any_work(
    run_dir, capsys, monkeypatch
):
    monkeypatch.setattr(main, "run_conditional_diffusion_inference", lambda *_, **__: pytest.fail("work"))
    for flags in (["a{1-2}b{2-3}c"], ["a{1-2}b", "--suffix={1-2}c"], ["a {2-4}"], ["a{3}b{2-5}"], ["a {4080-4100} b"]):
        assert main.main(["generate", "--prompt", *flags]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_top_p_temperature_and_seed_act_in_holes_and_an_end_without_a_tail_is_refused(run_dir, capsys):
    texts = set()
    for flags in ([], ["--temperature=0"], ["--temperature=3", "--top_p=1"], ["--seed=1"]):
        assert main.main(["generate", "--prompt", "the {8} fox", *flags]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 4
    assert main.main(["generate", "--prompt", "the {8} fox", "--until", "x"]) == 2
    assert "until='x' is not possible" in capsys.readouterr().err
    assert main.main(["generate", "--prompt", "the {8} fox", "--until", "x", "--response_length=5"]) == 0


def test_fewer_fillings_than_asked_for_are_said(run_dir, capsys):
    assert main.main(["generate", "--prompt", "the {1-2} fox", "--samples=3", "--temperature=0"]) == 0
    output = capsys.readouterr()
    assert output.out.count("--- filling") == 2
    assert "notice: 2 different fillings were drawn" in output.err
    assert "filling 2 lengths of up to 10 bytes, each filled 16 times" in output.err


def test_a_window_slides_over_a_text_longer_than_the_rotary_table_and_python_may_set_the_table():
    config = main.CONFIG(**{**TINY, "block_length": 4, "rope_max_length_buffer": 20})
    model = random_model(config)
    long = main.run_conditional_diffusion_inference(model, "a", 60, config)
    wide = dataclasses.replace(config, rope_max_length_buffer=100)
    assert long == main.run_conditional_diffusion_inference(random_model(wide), "a", 60, wide)
    whole = dataclasses.replace(config, block_length=0)
    model = random_model(whole)
    with pytest.raises(main.InputError, match="exceed rope_max_length_buffer=20"):
        main.run_conditional_diffusion_inference(model, "a", 60, whole)
    assert main.run_conditional_diffusion_inference(
        model, "a", 60, dataclasses.replace(whole, rope_max_length_buffer=100)
    )


@pytest.mark.parametrize("n", [0, 4])
def test_many_texts_are_written_in_parts_that_fit_into_memory_and_come_out_as_in_one(monkeypatch, n):
    config = main.CONFIG(**{**TINY, "block_length": n})
    model, prompts, sizes = random_model(config), [[*b"ab", *HOLE * 6]] * 5, []
    write = lambda: main.run_conditional_diffusion_inference(
        model, prompts, 0, config, on_step=lambda x: sizes.append(len(x))
    )
    in_one = write()
    assert set(sizes) == {5}
    monkeypatch.setattr(main, "BYTES_AT_ONCE", 16)
    assert write() == in_one
    assert set(sizes) == {5, 2, 1}
    assert main.write_many(model, prompts, config, 0).shape == (5, 8)


def test_flags_with_hyphens_a_tilde_after_the_equals_sign_and_a_bare_resume_are_understood(
    text_folder, monkeypatch, capsys
):
    monkeypatch.chdir(text_folder)
    monkeypatch.setenv("HOME", str(text_folder))
    assert main.main([*TINY_FLAGS, "--max-steps=1", "--num-samples", "0", "--train_data_file=~/train.txt"]) == 0
    assert main.main(["--resume", "--max_steps=2"]) == 0
    assert "going on with runs/" in capsys.readouterr().out


def test_one_command_starts_and_restarts(text_folder, monkeypatch, capsys):
    monkeypatch.chdir(text_folder)
    command = [*TINY_FLAGS, "--num_samples=0", "--resume=auto"]
    for max_steps, first_line in ((1, "no run to go on with: a new one begins"), (2, "going on with runs/")):
        assert main.main([*command, f"--max_steps={max_steps}"]) == 0
        assert capsys.readouterr().out.startswith(first_line)
    assert len(list((text_folder / "runs").iterdir())) == 1


def test_the_printed_command_to_go_on_survives_a_quote_in_the_name(text_folder):
    _, console = train_tiny(text_folder, "--max_steps=1", "--name=it's", "--num_samples=0")
    command = next(line for line in console.splitlines() if line.startswith("try the best"))
    assert (text_folder / shlex.split(command)[-1]).is_dir()


def is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_a_signal_is_heeded_by_all_processes_at_the_next_step_whatever_log_every_is(text_folder):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "main.py"),
    ]
    flags = [*TINY_FLAGS, "--num_samples=0", "--max_steps=1000000", "--log_every=1000000", "--checkpoint_every=5"]
    options = {"cwd": text_folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agent = subprocess.Popen([*command, *flags], **options, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(text_folder.glob("runs/*/latest.pt")):
        time.sleep(0.05)
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(workers) == 2
    agent.kill()  # the workers are left alone; they save and end
    agent.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < end, "workers whose agent is gone go on"
        time.sleep(0.1)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs signals")
def test_the_signal_of_a_scheduler_before_its_time_limit_saves_and_ends(text_folder):
    command = [sys.executable, str(ROOT / "main.py"), *TINY_FLAGS, "--max_steps=100000", "--num_samples=0"]
    process = subprocess.Popen(command, cwd=text_folder, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGUSR1)
    assert "and saved" in process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGUSR1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_keeps_its_checkpoints(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert main.save_checkpoint(tmp_path, "latest.pt", main.TrainingState(main.CONFIG(**TINY)))
    assert main.read_checkpoint(tmp_path / "latest.pt")["step"] == 0


def test_two_processes_do_not_train_the_same_run(run_dir, capsys):
    config = main.CONFIG(**TINY)
    first = main.claim_run(run_dir, config)
    with pytest.raises(main.InputError, match="another process is training this run"):
        main.claim_run(run_dir, config)
    first.close()
    main.claim_run(run_dir, config).close()


def test_a_checkpoint_that_stands_alone_is_gone_on_from_in_a_new_folder(run_dir, text_folder):
    (run_dir / "latest.pt").rename(text_folder / "model.pt")
    before = {*os.listdir(text_folder)}
    assert main.main(["--resume", "model.pt", "--max_steps=3"]) == 0
    assert {*os.listdir(text_folder)} == before
    assert len(list((text_folder / "runs").iterdir())) == 2


def test_a_validation_repeated_after_a_crash_stands_in_samples_once(text_folder, monkeypatch):
    monkeypatch.chdir(text_folder)
    state, log = (
        main.TrainingState(main.CONFIG(**TINY)),
        type("Log", (), {"add": lambda *_: None, "run_dir": text_folder}),
    )
    dataset = main.ByteLevelTextDataset("validation.txt", 16)
    for heading in ("## step 2: bound 3.1\n\n", "## step 2: bound 3.2\n\n", "## step 24: bound 3.0\n\n"):
        main.show_samples(state, dataset, log, heading)
    assert re.findall("## step .*", (text_folder / "samples.txt").read_text()) == [
        "## step 2: bound 3.1",
        "## step 24: bound 3.0",
    ]


def test_a_checkpoint_made_by_hand_needs_no_step(run_dir, capsys):
    state = main.read_checkpoint(run_dir / "latest.pt")
    torch.save({name: state[name] for name in ("config", "ema")}, "by_hand.pt")
    assert main.main(["generate", "--checkpoint", "by_hand.pt", "--prompt=a", "--response_length=2"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes of a shell")
@pytest.mark.parametrize(
    "command", ["generate --prompt a --response_length 9 --samples 9", "evaluate --json --chunks 2"]
)
def test_a_closed_pipe_ends_a_command_silently(run_dir, command):
    shell = f"'{sys.executable}' '{ROOT / 'main.py'}' {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)  # 0: it had written before the pipe was closed
    assert "roken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(run_dir):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "main.py"), "generate", "--prompt=a", "--response_length=2"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "error: [Errno 28] No space left on device" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


def test_text_is_shown_in_whole_characters(tmp_path, capsys):
    (tmp_path / "train.txt").write_bytes("日本語の文章です。".encode() * 60)
    (tmp_path / "validation.txt").write_bytes("文章です、日本語の。".encode() * 30)
    run_dir, _ = train_tiny(tmp_path, "--max_steps=1", "--num_samples=5", "--max_length=32")
    shown = re.findall(r"(?:prompt|truth)\n\n    (.*)\n", (run_dir / "samples.txt").read_text("utf-8"))
    assert len(shown) == 10
    assert not [text for text in shown if "\ufffd" in text]


def test_a_stream_without_isatty_and_a_thread_that_is_not_the_main_one_can_train(text_folder, monkeypatch):
    class Stream(io.StringIO):
        isatty = property()  # raises AttributeError

    monkeypatch.chdir(text_folder)
    monkeypatch.setattr(sys, "stdout", Stream())
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main.main([*TINY_FLAGS, "--max_steps=1", "--num_samples=0"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_the_source_can_be_executed_without_a_file(text_folder):
    code = (
        f"exec(open({str(ROOT / 'main.py')!r}).read(), g := {{'__name__': 'notebook'}}); g['main'](['--max_steps=0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=text_folder, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "error: max_steps=0 is not possible: it must be above 0"


def test_a_file_that_cannot_be_mapped_is_named(text_folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(main.mmap, "mmap", refuse)
    with pytest.raises(
        main.InputError, match=r"train\.txt: cannot be mapped into memory, .* \(\[Errno 19\] No such device\)"
    ):
        main.ByteLevelTextDataset(text_folder / "train.txt", 16)


def test_a_tensorboard_that_cannot_be_imported_is_one_line(text_folder):
    (text_folder / "tensorboard.py").write_text("raise TypeError('Descriptors cannot be created directly.\\nmore')")
    done = run_main(text_folder, *TINY_FLAGS, "--max_steps=1", PYTHONPATH=str(text_folder))
    assert done.returncode == 2
    assert "error: tensorboard: Descriptors cannot be created directly.; run: pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_notice_of_torch_about_cuda_is_not_printed(text_folder):
    done = run_main(text_folder, *TINY_FLAGS, "--max_steps=1", "--num_samples=0", CUDA_HOME=str(text_folder))
    assert done.returncode == 0
    assert "CUDA runtime" not in done.stdout + done.stderr


def test_the_bar_follows_the_width_of_the_terminal(text_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "tqdm", lambda *_, **options: seen.append(options) or pytest.skip())
    with pytest.raises(pytest.skip.Exception):
        main.Log(main.TrainingState(main.CONFIG(**TINY)), text_folder)
    assert seen[0]["dynamic_ncols"]


def test_the_sentence_on_memory_names_flags_that_the_command_has(run_dir, monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(main, "load_for_command", fail)
    for command, flag in (("generate", "--samples"), ("evaluate", "--chunks")):
        assert main.main([command]) == 1
        assert flag in capsys.readouterr().err
