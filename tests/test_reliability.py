"""Nothing is lost: crashes, damaged files, full disks, hostile input, many processes.

The longer forms of some tests: `RELIABILITY_ROUNDS=100 python -m pytest tests/test_reliability.py`.
"""

import dataclasses
import gc
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, fill, run_main, train_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main

ROUNDS = int(os.environ.get("RELIABILITY_ROUNDS", "3"))
QUICK = [*TINY_FLAGS, "--num_samples=0", "--max_steps=1000000000", "--checkpoint_every=1", "--validate_every=7"]


def start_main(folder, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def one_line(process_or_done, code):
    assert process_or_done.returncode == code, process_or_done.stdout + process_or_done.stderr
    lines = process_or_done.stderr.strip().splitlines()
    assert len(lines) == 1, process_or_done.stderr
    return lines[0]


def saved_since(run_dir, moment):
    return (run_dir / "latest.pt").stat().st_mtime_ns > moment


def test_a_kill_at_any_moment_leaves_a_checkpoint_to_go_on_from(text_folder):
    """Each round goes on with the run of the round before and is killed without notice, often while it saves."""
    rng, arguments, step = random.Random(ROUNDS), QUICK, -1
    for _ in range(ROUNDS):
        process = start_main(text_folder, *arguments)
        wait_for(lambda: list(text_folder.glob("runs/*/latest.pt")))
        (run_dir,) = (text_folder / "runs").iterdir()
        began = (run_dir / "latest.pt").stat().st_mtime_ns
        wait_for(lambda run_dir=run_dir, began=began: saved_since(run_dir, began))
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
        state = main.read_checkpoint(run_dir / "latest.pt")
        assert state["step"] > step
        arguments, step = ["--resume", "auto"], state["step"]
    last = run_main(text_folder, "--resume", "auto", f"--max_steps={step + 2}")
    assert last.returncode == 0, last.stderr
    assert not list(run_dir.glob("*.tmp"))


def same(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_damaged_checkpoint_is_found_out_wherever_the_damage_is(tmp_path, config):
    """Every flipped bit and every truncation is one line, or is in the padding and changes nothing."""
    main.save_checkpoint(tmp_path, "latest.pt", main.TrainingState(config))
    path, rng = tmp_path / "latest.pt", random.Random(0)
    whole, state = path.read_bytes(), main.read_checkpoint(path)
    found = 0
    for number in range(200):
        position = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if number % 2 else whole[:position])
        try:
            assert same(main.read_checkpoint(path), state)
        except main.InputError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            found += 1
    assert found > 150


def test_a_checkpoint_of_other_weights_is_one_line(tmp_path, config):
    state, other = main.TrainingState(config), dataclasses.replace(config, model_dim=64)
    torch.save(state.state_dict() | {"config": dataclasses.asdict(other)}, tmp_path / "latest.pt")
    with pytest.raises(main.InputError, match="its weights are not of its CONFIG") as refused:
        main.load_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_damaged_checkpoint_is_named_and_the_best_one_can_be_gone_on_from(text_folder, monkeypatch, capsys):
    run_dir, _ = train_tiny(text_folder, "--max_steps=9", "--validate_every=4")
    latest, best = run_dir / "latest.pt", run_dir / "best.pt"
    latest.write_bytes(latest.read_bytes()[:1000])
    monkeypatch.chdir(text_folder)
    assert main.main(["--resume", "auto", "--max_steps=12"]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    assert "latest.pt: not a readable checkpoint" in message
    assert f"--resume {best.relative_to(text_folder)}" in message
    assert main.main(["--resume", str(best), "--max_steps=12"]) == 0
    assert main.read_checkpoint(latest)["step"] == 12
    assert len(list((text_folder / "runs").iterdir())) == 1


def test_a_checkpoint_that_may_not_be_written_keeps_the_one_before(tmp_path, config, capsys):
    state = main.TrainingState(config)
    assert main.save_checkpoint(tmp_path, "latest.pt", state)
    (tmp_path / "latest.pt.tmp").mkdir()  # stands for a folder without permission, which root always has
    state.step = 9
    assert not main.save_checkpoint(tmp_path, "latest.pt", state)
    assert "latest.pt cannot be written" in capsys.readouterr().out
    assert main.read_checkpoint(tmp_path / "latest.pt")["step"] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
def test_a_full_disk_is_said_and_keeps_the_checkpoint_before(text_folder):
    run_dir, _ = train_tiny(text_folder, "--max_steps=2")
    blocks = (run_dir / "latest.pt").stat().st_size // 1024 // 2  # half a checkpoint
    command = f"ulimit -f {blocks}; exec '{sys.executable}' '{ROOT / 'main.py'}' --resume auto --max_steps=6 "
    command += "--checkpoint_every=2"
    done = subprocess.run(["bash", "-c", command], cwd=text_folder, capture_output=True, text=True, check=False)
    assert "could not be saved" in one_line(done, 1)
    assert done.stdout.count("latest.pt cannot be written") == 2  # after the steps 4 and 6
    assert "step 6: bound" in done.stdout
    assert main.read_checkpoint(run_dir / "latest.pt")["step"] == 2
    assert not list(run_dir.glob("*.tmp"))


def test_a_best_model_that_could_not_be_saved_does_not_keep_the_next_one_from_being_saved(text_folder, monkeypatch):
    bounds = iter([0, 9, 5, 9, 0, 9, 3, 9, 0, 9, 4, 9, 0, 9])  # bound and next byte of training, then validation text
    monkeypatch.setattr(main, "mean_over_bytes", lambda *_: (float(next(bounds)), 0.1))
    original = main.save_checkpoint
    is_full = lambda name, state: (name, state.step) == ("best.pt", 4)
    monkeypatch.setattr(main, "save_checkpoint", lambda *a: False if is_full(*a[1:]) else original(*a))
    run_dir, _ = train_tiny(text_folder, "--max_steps=6", "--validate_every=2", "--num_samples=0")
    saved = main.read_checkpoint(run_dir / "best.pt")
    assert (saved["step"], saved["best_bound"]) == (6, 4.0)


def test_a_full_disk_silences_tensorboard_but_not_the_training(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    log = main.Log(main.TrainingState(main.CONFIG(**TINY)), tmp_path)
    monkeypatch.setattr(log.writer, "add_scalar", fail)
    for _ in range(3):
        log.add("scalar", "train/loss", 1.0)
    log.close()
    assert capsys.readouterr().out.count("TensorBoard's log cannot be written (No space left on device)") == 1


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_weights_that_are_not_finite_are_never_saved(text_folder, monkeypatch, capsys, part):
    monkeypatch.chdir(text_folder)
    original, calls = main.masked_diffusion_loss, iter(range(100))

    def explode(*arguments):
        loss, is_bad = original(*arguments), next(calls) == 5
        if is_bad and part == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss * (float("nan") if is_bad and part == "loss" else 1.0)

    monkeypatch.setattr(main, "masked_diffusion_loss", explode)
    assert main.main([*TINY_FLAGS, "--max_steps=20", "--num_samples=0", "--checkpoint_every=2"]) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert "step 6: the loss is" in message
    assert "learning_rate" in message
    (run_dir,) = (text_folder / "runs").iterdir()
    state = main.read_checkpoint(run_dir / "latest.pt")
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_at_the_start_ends_at_once(text_folder):
    code = f"""
import sys, time, signal, os, threading
sys.path.insert(0, {str(ROOT)!r})
import main
def slow(*_):
    print("reading", flush=True)
    time.sleep(60)
main.open_datasets = slow
sys.exit(main.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=text_folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_training_goes_on_when_nobody_reads_its_output_any_more(text_folder):
    process = start_main(text_folder, *TINY_FLAGS, "--num_samples=0", "--max_steps=200", "--validate_every=20")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    (latest,) = text_folder.glob("runs/*/latest.pt")
    assert main.read_checkpoint(latest)["step"] == 200


def test_a_signal_during_validation_saves_and_ends(text_folder):
    flags = [*TINY_FLAGS, "--max_steps=1000000000", "--validate_every=1", "--num_samples=4"]
    process = start_main(text_folder, *flags)
    wait_for(lambda: list(text_folder.glob("runs/*/samples.txt")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    (run_dir,) = (text_folder / "runs").iterdir()
    assert "stopped at step" in output
    assert main.read_checkpoint(run_dir / "latest.pt")["step"] > 0


def test_a_second_signal_ends_the_run_at_once(text_folder):
    long = ["--max_length=300", "--num_samples=300", "--validate_every=1"]
    process = start_main(text_folder, *TINY_FLAGS, *long)
    wait_for(lambda: "bound" in process.stdout.readline())  # its samples come next, and take some time
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_a_text_that_shrinks_while_it_is_used_ends_the_run_in_one_line(text_folder):
    process = start_main(text_folder, *QUICK)
    wait_for(lambda: list(text_folder.glob("runs/*/latest.pt")))
    os.truncate(text_folder / "train.txt", 100)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "error: train.txt: has become shorter than its 1,800 bytes" in output
    assert "Traceback" not in output


def test_a_text_that_is_replaced_or_grows_while_it_is_used_does_no_harm(text_folder):
    process = start_main(text_folder, *QUICK, "--max_minutes=0.06")
    wait_for(lambda: list(text_folder.glob("runs/*/latest.pt")))
    with open(text_folder / "train.txt", "ab") as file:
        file.write(b"more" * 1000)
    (text_folder / "new.txt").write_bytes(b"x")
    os.replace(text_folder / "new.txt", text_folder / "validation.txt")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


@pytest.mark.parametrize("content", ["folder", "empty", "unreadable"])
def test_a_text_that_cannot_be_used_is_one_line(text_folder, content):
    path = text_folder / "train.txt"
    path.unlink()
    path.mkdir() if content == "folder" else path.write_bytes(b"")
    if content == "unreadable":
        path.unlink()
        path.symlink_to(path)
    assert "train.txt" in one_line(run_main(text_folder, *TINY_FLAGS), 2)


def test_training_on_the_validation_text_is_warned_of(text_folder):
    shutil.copy(text_folder / "train.txt", text_folder / "validation.txt")
    _, console = train_tiny(text_folder, "--max_steps=1")
    assert "warning: train.txt and validation.txt are the same text" in console


def test_running_out_of_memory_is_one_line_that_says_what_to_lower(text_folder):
    message = one_line(run_main(text_folder, *TINY_FLAGS, "--model_dim=2000", f"--ffn_dim={10**9}"), 1)
    assert "out of memory; lower batch_size or max_length" in message
    command = f"ulimit -v 8000000; exec '{sys.executable}' '{ROOT / 'main.py'}' {' '.join(TINY_FLAGS)} "
    command += f"--rope_max_length_buffer={2 * 10**8}"  # 8 GB, of which the table would need 100
    done = subprocess.run(["bash", "-c", command], cwd=text_folder, capture_output=True, text=True, check=False)
    assert "out of memory; lower batch_size or max_length" in one_line(done, 1)


NUMBERS = st.one_of(st.integers(-3, 70), st.floats(-2, 40), st.sampled_from([10**9, -(10**9), 2**64, 1e-9, 1e300]))
VALUES = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=5), st.floats(allow_nan=True))
FIELDS = [field.name for field in dataclasses.fields(main.CONFIG)]


@settings(max_examples=160 * ROUNDS, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_config_is_accepted_or_refused_in_one_line_that_names_a_field(overrides):
    try:
        config = main.CONFIG(**{**TINY, **overrides})
    except main.InputError as error:
        assert "\n" not in str(error)
        assert re.match(rf"({'|'.join(FIELDS)})=", str(error))
    else:
        assert main.CONFIG(**dataclasses.asdict(config)) == config


WORDS = st.one_of(
    st.sampled_from(
        ["generate", "evaluate", "profile", "--resume", "auto", "--prompt", "--samples", "--watch", "--help", "-h3"]
    ),
    st.builds("--{}={}".format, st.sampled_from([*FIELDS, "prompt", "chunks", "samples", "file"]), VALUES),
    st.builds("--{}".format, st.sampled_from(FIELDS)),
    st.text(max_size=6),
)


@settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arguments=st.lists(WORDS, max_size=4))
def test_any_command_line_runs_or_is_refused_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(main, "train", lambda *_: 0)
        patch.setattr(main, "check_writable", lambda _: sys.exit(0))  # with which profile begins its work
        try:
            code = main.main(arguments)
        except SystemExit as shown:  # the help, which Python 3.13 also shows for -h3
            code = shown.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code in (0, 2)
    assert len(lines) == (code == 2)
    assert not list(tmp_path.iterdir())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "max_length": st.integers(2, 8),
            "block_length": st.integers(0, 5),
            "batch_size": st.integers(1, 5),
            "num_heads": st.integers(1, 3),
            "num_layers": st.integers(1, 3),
            "kv_latent_dim": st.integers(1, 9),
            "ffn_dim": st.integers(1, 9),
            "conv_width": st.sampled_from([0, 1, 3, 9]),
            "attention": st.sampled_from(["simplified_mla", "mla", "mha"]),
            "gradient_accumulation_steps": st.integers(1, 3),
            "inference_steps": st.integers(0, 5),
            "dropout": st.sampled_from([0.0, 0.9]),
            "muon_learning_rate": st.sampled_from([0.0, 0.02]),
            "mask_ratio_std": st.sampled_from([0.0, 0.1, 5.0]),
            "warmup_steps": st.integers(0, 3),
            "remasking": st.sampled_from(main.STRATEGIES),
            "hole_share": st.sampled_from([0.0, 0.5, 1.0]),
            "num_samples": st.integers(0, 2),
        }
    )
)
def test_any_accepted_size_trains_and_samples(tmp_path_factory, overrides):
    folder = tmp_path_factory.mktemp("any")
    for name in ("train.txt", "validation.txt"):
        (folder / name).write_bytes(random.Random(name).randbytes(100))
    sizes = {"model_dim": 4 * overrides["num_heads"], "qk_rope_head_dim": 2, "max_steps": 2}
    sizes["max_length"] = overrides["max_length"] * (overrides["block_length"] or 5)
    settings_ = {**TINY, **overrides, **sizes}
    if settings_["block_length"]:  # these are of LLaDA's sampler alone
        del settings_["inference_steps"], settings_["remasking"]
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert main.main([f"--{name}={value}" for name, value in settings_.items()]) == 0
    finally:
        os.chdir(here)


@pytest.mark.parametrize("prompt", [bytes(range(256)), b"\xff\xfe\x00", "ñ\ud800".encode(errors="surrogatepass")])
def test_prompts_of_any_bytes(model, config, prompt):
    (filled,) = fill(model, [[*prompt, main.MASK]], config)
    assert filled[:-1] == prompt


def test_paths_with_spaces_and_other_scripts(tmp_path):
    folder = tmp_path / "été 日本 x"
    folder.mkdir()
    (folder / "mein Text.txt").write_bytes(bytes(range(256)) * 8)
    run_dir, console = train_tiny(folder, "--max_steps=1", "--train_data_file=mein Text.txt", "--name=Versuch 1 ü")
    assert f"tensorboard --logdir={run_dir.parent.resolve()}  (this run: {run_dir.name})" in console
    done = run_main(folder, "generate", "--checkpoint", str(run_dir), "--response_length=4")
    assert done.returncode == 0, done.stderr


def torchrun(folder, processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", str(ROOT / "main.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_run_goes_on_with_another_number_of_processes_as_if_nothing_had_happened(text_folder):
    """The same global batch: 8 rows in one process, 4 in each of two."""
    common = [*TINY_FLAGS, "--num_samples=0", "--max_steps=6", "--warmup_steps=2"]
    assert run_main(text_folder, *common, "--name=one").returncode == 0
    assert torchrun(text_folder, 2, *common, "--name=two", "--batch_size=4").wait(timeout=120) == 0
    one, two = (next(text_folder.glob(f"runs/{name}_*")) / "latest.pt" for name in ("one", "two"))
    compare_weights(one, two)
    assert torchrun(text_folder, 2, f"--resume={one}", "--batch_size=4", "--max_steps=12").wait(timeout=120) == 0
    assert run_main(text_folder, f"--resume={two}", "--batch_size=8", "--max_steps=12").returncode == 0
    compare_weights(one, two)


def compare_weights(*paths):
    one, two = map(main.read_checkpoint, paths)
    assert one["step"] == two["step"]
    for kind in ("model", "ema"):
        for name, tensor in one[kind].items():
            # 3e-4 is a hundredth of one step of AdamW, which divides gradients that are all rounding by their size
            torch.testing.assert_close(tensor, two[kind][name], rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_gradients_are_exchanged_once_per_step_whatever_the_accumulation(text_folder, monkeypatch, splits):
    counts, distributed = [], torch.nn.parallel.DistributedDataParallel

    def count_exchanges(*arguments, **options):
        model = distributed(*arguments, **options)

        def exchange(_, bucket):
            counts.append(bucket.is_last())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, exchange)
        return model

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", count_exchanges)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    train_tiny(text_folder, "--max_steps=4", f"--gradient_accumulation_steps={splits}", "--num_samples=0")
    assert sum(counts) == 4


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_process_that_dies_ends_the_whole_run_in_order_and_it_can_go_on(text_folder):
    process = torchrun(text_folder, 2, *QUICK)
    wait_for(lambda: list(text_folder.glob("runs/*/latest.pt")))
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert any(text in output for text in ("another process is gone; use --resume", "stopped", "SIGTERM"))
    step = main.read_checkpoint(next(text_folder.glob("runs/*/latest.pt")))["step"]
    done = run_main(text_folder, "--resume", "auto", f"--max_steps={step + 2}")
    assert done.returncode == 0, done.stderr


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_many_steps_leak_no_memory_no_files_and_no_threads(text_folder, monkeypatch):
    monkeypatch.chdir(text_folder)
    seen = []
    original = main.Log.step

    def watch(log, *scalars):
        original(log, *scalars)
        gc.collect()
        seen.append((resident_bytes(), len(os.listdir("/proc/self/fd")), threading.active_count()))

    monkeypatch.setattr(main.Log, "step", watch)
    flags = [*TINY_FLAGS, "--max_steps=600", "--validate_every=150", "--num_samples=1"]
    assert main.main([*flags, "--log_every=50", "--checkpoint_every=50"]) == 0
    memory, files, threads = zip(*seen[5:])  # after the first validation
    assert max(memory) - memory[0] < 30e6
    assert max(files) <= files[0] + 2, files  # TensorBoard opens its file anew for each write
    assert max(threads) == threads[0]


def test_files_are_made_with_the_modes_that_the_user_has_set(text_folder):
    command = f"umask 077; exec '{sys.executable}' '{ROOT / 'main.py'}' --max_steps=1 {' '.join(TINY_FLAGS)}"
    done = subprocess.run(["bash", "-c", command], cwd=text_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in (text_folder / "runs").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
