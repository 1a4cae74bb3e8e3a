"""Training: schedule, averaged weights, validation, checkpoints and resuming."""

import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, needs_gpu, random_model, read_events, read_scalars, run_main, train_tiny

import main


def test_the_learning_rate_warms_up_and_decays_to_zero_at_the_last_step():
    config = main.CONFIG(**TINY, max_steps=1000, warmup_steps=100)
    scales = [main.learning_rate_scale(config, step, 0.0) for step in range(1001)]
    assert 0 < scales[0] < 0.02
    assert max(scales) == pytest.approx(scales[100], rel=0.02)
    assert all(a >= b for a, b in itertools.pairwise(scales[100:]))
    assert scales[1000] == 0


def test_the_learning_rate_decays_by_the_clock_if_that_ends_first():
    config = main.CONFIG(**TINY, max_steps=10**9, warmup_steps=0, max_minutes=10)
    assert [main.learning_rate_scale(config, 5, minutes) for minutes in (0, 5, 10, 11)] == [
        pytest.approx(1.0, abs=1e-6),
        pytest.approx(0.5),
        0.0,
        0.0,
    ]


def test_the_averaged_weights_follow_the_exponential_moving_average(config):
    state = main.TrainingState(main.CONFIG(**TINY, ema_decay=0.9))
    history = [state.model.output.weight.detach().clone()]
    for _ in range(5):
        main.masked_diffusion_loss(state.model, torch.randint(0, 256, (4, 16))).backward()
        main.optimizer_step(state)
        history.append(state.model.output.weight.detach().clone())
    expected = history[0]
    for step, weight in enumerate(history[1:]):
        decay = min(0.9, (1 + step) / (10 + step))  # a shorter memory at first
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(state.ema.output.weight, expected)


def test_gradients_are_clipped_to_the_given_norm(config):
    state = main.TrainingState(main.CONFIG(**TINY, gradient_clip_val=1e-3))
    main.masked_diffusion_loss(state.model, torch.randint(0, 256, (4, 16))).backward()
    seen = []
    state.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in state.model.parameters()]).norm().item())
    )
    assert main.optimizer_step(state).item() > 1e-3
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def validation_set(folder, max_length=16):
    return main.ByteLevelTextDataset(folder / "validation.txt", max_length)


def test_validating_twice_gives_the_same_number_and_leaves_the_generators_alone(model, text_folder):
    before = torch.get_rng_state()
    first = main.estimate_nelbo(model, validation_set(text_folder))
    torch.rand(10)
    assert main.estimate_nelbo(model, validation_set(text_folder)) == first
    assert main.estimate_nelbo(model, validation_set(text_folder), seed=1) != first
    torch.set_rng_state(before)
    main.estimate_nelbo(model, validation_set(text_folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_bound_does_not_depend_on_the_batch_size(model, text_folder):
    bounds = [main.estimate_nelbo(model, validation_set(text_folder), batch_size=size) for size in (64, 7)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-5)


def test_the_bound_of_uniform_predictions_is_eight_bits_without_error(text_folder, config):
    (text_folder / "validation.txt").write_bytes(b"x" * 100)  # with a partial last chunk
    assert main.estimate_nelbo(main.MaskPredictor(config), validation_set(text_folder)) == (
        pytest.approx(8.0, abs=1e-5),
        pytest.approx(0.0, abs=1e-5),
    )


def test_the_partial_last_chunk_counts_by_its_bytes(tmp_path):
    """A predictor that knows `a` and nothing else: 0 bits for each a, a fixed price for each b."""

    class Knows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(()))

        def forward(self, tokens, **_):
            logits = torch.full((*tokens.shape, 256), -1e9)
            logits[..., ord("a")] = 0.0
            logits[..., ord("b")] = -math.log(1024)  # 10 bits
            return logits

    (tmp_path / "validation.txt").write_bytes(b"a" * 32 + b"b" * 8)
    mean, error = main.estimate_nelbo(Knows(), validation_set(tmp_path))
    assert mean == pytest.approx(10 * 8 / 40, rel=0.01)
    assert error > 0


def test_a_part_of_the_validation_text_is_spread_over_all_of_it(model, text_folder, monkeypatch):
    dataset = validation_set(text_folder)
    asked, original = [], dataset.read
    monkeypatch.setattr(dataset, "read", lambda starts: asked.extend(starts) or original(starts))
    main.estimate_nelbo(model, dataset, max_bytes=5 * 16)
    assert len(asked) == 5
    assert asked[0] == 0
    assert asked[-1] >= len(dataset) * 16 * 3 // 4


def test_a_run_writes_what_the_readme_promises(text_folder):
    run_dir, console = train_tiny(text_folder, "--max_steps=30", "--validate_every=10", "--checkpoint_every=10")
    assert run_dir.name.startswith("diffusion_")
    assert {"latest.pt", "best.pt", "config.json", "samples.txt"} < {p.name for p in run_dir.iterdir()}
    scalars = read_scalars(run_dir)
    assert set(scalars) == {
        *("train/loss", "train/bits_per_byte", "train/learning_rate", "train/gradient_norm", "train/bytes_per_second"),
        *("val/bits_per_byte", "val/best_bits_per_byte", "val/final_bits_per_byte"),
        *("train/next_byte_bits_per_byte", "val/next_byte_bits_per_byte", "val/final_next_byte_bits_per_byte"),
        *("final/steps", "final/minutes"),
    }
    assert sorted(scalars["train/loss"]) == [10, 20, 30]
    assert sorted(scalars["val/bits_per_byte"]) == [10, 20, 30]
    assert sorted(scalars["train/bits_per_byte"]) == [10, 20, 30]
    events = read_events(run_dir)
    texts = {"samples/text_summary", "settings/text_summary"}
    assert texts <= set(events.Tags()["tensors"])
    assert f"tensorboard --logdir={run_dir.parent.resolve()}  (this run: {run_dir.name})" in console
    for word in ("cpu", "fp32", "parameters", "bytes", "times the training text", "left"):
        assert word in console
    assert "\r" not in console
    assert "\x1b" not in console


def test_a_model_learns_a_simple_text(text_folder):
    """Far below the 8 bits of chance, the 4.3 of single bytes and the 3.0 of byte pairs: the context is used."""
    run_dir, _ = train_tiny(text_folder, "--max_steps=600", "--batch_size=32", "--learning_rate=0.01")
    model, config, _ = main.load_checkpoint(run_dir, device="cpu")
    dataset = main.ByteLevelTextDataset(text_folder / "train.txt", config.max_length)
    assert main.estimate_nelbo(model, dataset)[0] < 1.5
    text = main.run_conditional_diffusion_inference(model, "the quick b", 5, config)
    assert text == "the quick brown "


def test_validation_measures_and_samples_the_ema_weights_by_the_one_door_to_the_sampler(text_folder, monkeypatch):
    """Not the weights that are trained: with a slow EMA the two are far apart."""
    states, sampled, measured = [], [], []
    original_validate, original_sampler, original_measure = (
        getattr(main, name) for name in ("validate", "run_conditional_diffusion_inference", "measure")
    )

    def validate(state, *options):
        states.append(state)
        original_validate(state, *options)

    def sampler(model, *options, **more):
        sampled.append(model)
        return original_sampler(model, *options, **more)

    def measure(model, *options):
        measured.append(model)
        return original_measure(model, *options)

    for name, function in (
        ("validate", validate),
        ("run_conditional_diffusion_inference", sampler),
        ("measure", measure),
    ):
        monkeypatch.setattr(main, name, function)
    run_dir, console = train_tiny(text_folder, "--max_steps=4", "--ema_decay=0.5")
    (state,) = states
    assert not torch.equal(state.ema.output.weight, state.model.output.weight)
    assert [model is state.ema for model in sampled] == [True]
    assert [model is state.ema for model in measured] == [True] * 3  # both texts, and at the end
    events = read_events(run_dir)
    (samples,) = events.Tensors("samples/text_summary")
    text = samples.tensor_proto.string_val[0].decode()
    shown = re.findall(r"(?:prompt|model|truth)\n\n {4}(.*)\n", text)
    assert len(shown) == 3
    assert f"prompt  {shown[0]!r}" in console
    assert f"model   {shown[1]!r}"[:-1] in console  # a new model may write what ends a line


def test_a_model_of_a_text_that_is_half_spaces_does_not_answer_with_spaces_alone(tmp_path):
    line = b"          name        value             42        \n        alpha       beta     \n"
    (tmp_path / "train.txt").write_bytes(line * 60)
    (tmp_path / "validation.txt").write_bytes(line * 4)
    run_dir, _ = train_tiny(tmp_path, "--max_steps=300", "--max_length=64", "--batch_size=16")
    model, config, _ = main.load_checkpoint(run_dir, device="cpu")
    config = main.dataclasses.replace(config, inference_steps=0)
    samples = main.run_conditional_diffusion_inference(model, [""] * 16, 64, config)
    spaces = sum(sample.count(" ") for sample in samples) / (16 * 64)
    truth = line.count(b" ") / len(line)
    assert 0.6 * truth < spaces < 1.25 * truth


def test_where_nothing_is_in_view_the_model_expects_each_byte_as_often_as_it_occurs(text_folder):
    """The state that sampling starts from; were it left out of training, its errors would be in every sample."""
    run_dir, _ = train_tiny(text_folder, "--max_steps=400")
    model, _, _ = main.load_checkpoint(run_dir, device="cpu")
    text = np.frombuffer((text_folder / "train.txt").read_bytes(), np.uint8)
    frequencies = torch.from_numpy(np.bincount(text, minlength=256) / len(text))
    expected = model(torch.full((1, 16), main.MASK)).softmax(dim=-1)[0].mean(dim=0)
    assert (expected - frequencies).abs().sum() / 2 < 0.2


def test_load_checkpoint_gives_the_averaged_weights_in_eval_mode(text_folder):
    run_dir, _ = train_tiny(text_folder, "--max_steps=12", "--ema_decay=0.5")
    model, config, state = main.load_checkpoint(run_dir / "latest.pt", device="cpu")
    assert not model.training
    assert config.max_steps == 12
    assert state["step"] == 12
    assert torch.equal(model.output.weight, state["ema"]["output.weight"])
    assert not torch.equal(model.output.weight, state["model"]["output.weight"])


needs_bf16 = pytest.mark.skipif(not main.has_bf16("cpu"), reason="emulated bf16 differs from run to run")
BF16 = pytest.param(["--amp_dtype=bf16"], marks=needs_bf16)


@pytest.mark.parametrize("extra", [[], BF16, ["--gradient_accumulation_steps=2", "--dropout=0.2"]])
def test_a_crashed_run_resumes_to_exactly_the_weights_of_an_uninterrupted_one(text_folder, monkeypatch, extra):
    monkeypatch.chdir(text_folder)
    flags = [*TINY_FLAGS, "--max_steps=20", "--warmup_steps=2", "--checkpoint_every=10", "--num_samples=0", *extra]
    flags += ["--log_every=4", "--validate_every=5"]
    assert main.main([*flags, "--name=whole"]) == 0
    with monkeypatch.context() as patch:
        original = main.optimizer_step
        calls = iter(range(100))
        patch.setattr(main, "optimizer_step", lambda state: original(state) if next(calls) < 13 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main.main([*flags, "--name=part"])
    whole, part = (next(text_folder.glob(f"runs/{name}_*")) for name in ("whole", "part"))
    assert main.read_checkpoint(part / "latest.pt")["step"] == 10
    time.sleep(1)  # TensorBoard sorts the files of a run by the second in their names
    assert main.main(["--resume", str(part)]) == 0
    one, two = (main.read_checkpoint(run / "latest.pt") for run in (whole, part))
    assert one["step"] == two["step"] == 20
    for weights in ("model", "ema"):
        for name, tensor in one[weights].items():
            assert torch.equal(tensor, two[weights][name]), (weights, name)
    logged = [read_scalars(run) for run in (whole, part)]
    for tag in logged[0].keys() - {"train/bytes_per_second", "final/minutes"}:
        assert logged[0][tag] == pytest.approx(logged[1][tag], nan_ok=True), tag


def test_resume_auto_takes_the_newest_run_and_a_raised_max_steps(text_folder):
    train_tiny(text_folder, "--max_steps=4", "--name=old")
    newest, _ = train_tiny(text_folder, "--max_steps=4", "--name=new")
    done = run_main(text_folder, "--resume", "auto", "--max_steps=8")
    assert done.returncode == 0, done.stderr
    assert main.read_checkpoint(newest / "latest.pt")["step"] == 8
    assert len(list((text_folder / "runs").iterdir())) == 2


def test_a_finished_run_is_not_validated_or_saved_again(text_folder, monkeypatch, capsys):
    monkeypatch.chdir(text_folder)
    run_dir, _ = train_tiny(text_folder, "--max_steps=4", "--validate_every=2")
    before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    assert main.main(["--resume", "auto"]) == 0
    assert "ended at step 4" in (output := capsys.readouterr().out)
    assert "raise --max_steps" in output
    assert main.main(["--resume", "auto", "--max_steps=8", "--max_minutes=0.00001"]) == 0
    assert "raise --max_minutes" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}


def test_a_signal_in_the_last_step_comes_too_late_to_leave_anything_out(text_folder, monkeypatch, capsys):
    monkeypatch.chdir(text_folder)
    original = main.reason_to_stop
    received_in = lambda state, minutes, _: original(state, minutes, [2] if state.step == 3 else [])
    monkeypatch.setattr(main, "reason_to_stop", received_in)
    for max_steps, ending in ((3, "final bound"), (4, "to go on add to the command: --resume")):
        main.main([*TINY_FLAGS, "--num_samples=0", f"--max_steps={max_steps}"])
        assert ending in capsys.readouterr().out


def test_the_best_bound_of_another_text_is_not_compared_with(text_folder, monkeypatch):
    run_dir, _ = train_tiny(text_folder, "--max_steps=4")
    saved = main.read_checkpoint(run_dir / "latest.pt")
    config = main.saved_config(saved)
    assert main.TrainingState(config, saved).best_bound == saved["best_bound"] < math.inf
    other = main.dataclasses.replace(config, validation_bytes=64)
    assert main.TrainingState(other, saved).best_bound == math.inf


def test_a_chosen_precision_stays_on_its_device_and_is_chosen_anew_on_another(config, monkeypatch):
    saved = main.dataclasses.asdict(main.dataclasses.replace(config, amp_dtype="bf16"))
    for capabilities, auto in (({"avx512_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known, raising=False)
        assert main.CONFIG(device="cpu").amp_dtype == auto
        assert main.saved_config({"config": saved | {"amp_dtype": "fp32"}}, device="cpu").amp_dtype == "fp32"
        assert main.saved_config({"config": saved}, device="cpu").amp_dtype == auto  # in bf16 only where there is any
        assert main.saved_config({"config": saved | {"device": "cuda:0"}}, device="cpu").amp_dtype == auto


@pytest.mark.parametrize("flags", [["--max_steps=10"], ["--max_minutes=0.02", "--max_steps=100000"]])
def test_no_step_is_validated_twice(text_folder, monkeypatch, flags):
    steps, original = [], main.validate
    monkeypatch.setattr(main, "validate", lambda state, *options: steps.append(state.step) or original(state, *options))
    train_tiny(text_folder, *flags, "--validate_every=1", "--num_samples=0")
    assert steps == list(range(1, len(steps) + 1))


def test_max_minutes_ends_a_run_in_order(text_folder):
    started = time.monotonic()
    run_dir, console = train_tiny(
        text_folder, "--max_minutes=0.08", "--max_steps=100000000", "--log_every=1", "--warmup_steps=0"
    )
    assert time.monotonic() - started < 60
    assert "done:" in console
    scalars = read_scalars(run_dir)
    rates = list(scalars["train/learning_rate"].values())
    assert len(rates) > 1
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_saved(text_folder, number):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *TINY_FLAGS, "--max_steps=1000000"],
        cwd=text_folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume" in out
    assert "Traceback" not in err
    (latest,) = text_folder.glob("runs/*/latest.pt")
    assert main.read_checkpoint(latest)["step"] > 0


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(text_folder):
    done = run_main(text_folder, *TINY_FLAGS, "--max_steps=50", "--learning_rate=1e9", "--gradient_clip_val=1e9")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "learning_rate" in done.stderr
    assert not list(text_folder.glob("runs/*/latest.pt"))


def test_a_missing_compiler_is_one_warning_and_training_goes_on(text_folder):
    flags = [flag for flag in TINY_FLAGS if "compile" not in flag]
    done = run_main(
        text_folder,
        *flags,
        "--compile=true",
        "--max_steps=3",
        CXX="/nonexistent/compiler",
        TORCHINDUCTOR_CACHE_DIR=str(text_folder / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning:") == 1
    assert "torch.compile does not work here" in done.stdout


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_compiled_training_computes_what_eager_training_computes(text_folder, device):
    flags = ["--max_steps=6", "--log_every=1", f"--device={device}", "--amp_dtype=fp32"]
    eager, _ = train_tiny(text_folder, *flags, "--compile=false")
    compiled, console = train_tiny(text_folder, *flags, "--compile=true")
    assert "warning" not in console
    losses = [read_scalars(run)["train/loss"] for run in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_gradient_of_the_compiled_twin_is_that_of_the_eager_one_whatever_memory_held_before():
    """Its first byte is one query, whose compiled gradient was leftover memory: NaN at times, mostly unnoticed."""
    config = main.CONFIG(**{**TINY, "block_length": 1, "max_length": 64, "num_layers": 1})
    model, x0 = random_model(config), torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    noise = main.draw_noise(4, 64, torch.Generator().manual_seed(0), 1)

    def gradients(loss_function):
        for size in [2**k for k in range(3, 18)] * 6:
            torch.full((size,), math.nan)  # freed at once
        model.zero_grad()
        loss_function(model, x0, *noise).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    compiled, expected = torch.compile(main.masked_diffusion_loss, dynamic=False), gradients(main.masked_diffusion_loss)
    for _ in range(20):
        for ours, theirs in zip(gradients(compiled), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_two_processes_train_like_one_compiled_too(text_folder):
    flags = ["--max_steps=6", "--log_every=1", "--num_samples=1"]
    one, _ = train_tiny(text_folder, *flags, "--batch_size=8", "--name=one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "main.py")]
        + [*TINY_FLAGS, *flags, "--batch_size=4", "--name=two", "--compile=true"],
        cwd=text_folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout
    (two,) = text_folder.glob("runs/two_*")
    scalars = [read_scalars(run) for run in (one, two)]
    for tag in ("train/loss", "train/gradient_norm", "val/bits_per_byte"):
        assert scalars[0][tag] == pytest.approx(scalars[1][tag], rel=1e-4)
    assert done.stdout.count("device ") == 1


def test_damaged_and_foreign_checkpoints_are_one_line(tmp_path):
    path = tmp_path / "latest.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(main.InputError, match=r"latest\.pt: not a readable checkpoint"):
        main.load_checkpoint(path)
    torch.save({"hello": 1}, path)
    with pytest.raises(main.InputError, match="it holds no CONFIG"):
        main.load_checkpoint(path)
    with pytest.raises(main.InputError, match="none"):
        main.load_checkpoint(tmp_path / "none.pt")


def test_a_malicious_checkpoint_does_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(main.InputError):
        main.load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch, config):
    state = main.TrainingState(config)
    main.save_checkpoint(tmp_path, "latest.pt", state)
    state.step = 5

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    assert not main.save_checkpoint(tmp_path, "latest.pt", state)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    assert main.read_checkpoint(tmp_path / "latest.pt")["step"] == 0


def test_resuming_with_what_changes_the_model_is_one_line(text_folder, monkeypatch, capsys):
    run_dir, _ = train_tiny(text_folder, "--max_steps=2")
    monkeypatch.chdir(text_folder)
    for flag in ("--model_dim=64", "--num_layers=1", "--conv_width=3", "--muon_learning_rate=0"):
        assert main.main(["--resume", str(run_dir), flag, "--max_steps=4"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    state = main.read_checkpoint(run_dir / "latest.pt")
    assert state["step"] == 2
    state["config"]["gone"] = 1
    torch.save(state, run_dir / "latest.pt")
    assert main.main(["--resume", str(run_dir)]) == 2
    assert "CONFIG no longer has: gone" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "rounding"), [("bf16", 0.15), ("fp16", 0.02)])
def test_in_half_precision_loss_and_gradients_are_those_of_fp32_but_for_rounding(dtype, rounding):
    config = main.CONFIG(**{**TINY, "amp_dtype": dtype})
    model, x0, streams = random_model(config), torch.randint(0, 256, (8, 16)), []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, x: streams.append(x.dtype))
    losses, gradients, noise = [], [], main.draw_noise(8, 16, torch.Generator().manual_seed(0))
    for settings in (config, main.dataclasses.replace(config, amp_dtype="fp32")):
        with main.autocast(settings):
            loss = main.masked_diffusion_loss(model, x0, *noise)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    half, single = main.AMP_DTYPES[dtype], torch.float32
    assert streams == [half, half, single, single]
    assert losses[0] == pytest.approx(losses[1], rel=rounding / 10)
    for ours, reference in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() < rounding * reference.norm()


@needs_gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_training_runs_on_a_gpu_in_every_precision(text_folder, dtype):
    flags = ["--device=cuda", f"--amp_dtype={dtype}", "--max_steps=20", "--compile=true"]
    run_dir, console = train_tiny(text_folder, *flags)
    assert "cuda" in console
    assert main.load_checkpoint(run_dir)[2]["step"] == 20


@needs_gpu
def test_gpu_memory_does_not_grow_over_many_steps(text_folder, monkeypatch):
    allocated, step = [], main.train_step
    monkeypatch.setattr(
        main, "train_step", lambda *args: allocated.append(torch.cuda.memory_allocated()) or step(*args)
    )
    train_tiny(text_folder, "--device=cuda", "--max_steps=600", "--validate_every=100")
    assert max(allocated[300:]) <= max(allocated[100:300])


def test_in_fp16_a_step_is_taken_by_both_optimizers_or_by_none(config):
    """A single gradient that is not finite, in a matrix of either optimizer, leaves all weights as they were."""
    for name, bad in itertools.product(("output.weight", "layers.0.attention.wq.weight"), (math.nan, math.inf)):
        state = main.TrainingState(config)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(2):
            state.scaler.scale(main.masked_diffusion_loss(state.model, torch.randint(0, 256, (4, 16)))).backward()
            before = {key: value.clone() for key, value in state.model.state_dict().items()}
            if step == 1:
                dict(state.model.named_parameters())[name].grad[0, 0] = bad
            main.optimizer_step(state)
            changed = [key for key, value in state.model.state_dict().items() if not torch.equal(value, before[key])]
            assert bool(changed) == (step == 0), (name, changed)
        assert state.scaler.get_scale() == 512


def test_a_resumed_run_takes_a_new_weight_decay(config):
    saved = main.TrainingState(config).state_dict()
    state = main.TrainingState(main.dataclasses.replace(config, weight_decay=0.7), saved)
    assert [group["weight_decay"] for group in state.optimizers[0].param_groups] == [0.7, 0.0]


def test_a_finished_run_tells_tensorboard_which_settings_were_changed_and_what_came_out(text_folder):
    """As TensorBoard's HPARAMS reads them: columns from all runs, so that runs with other settings can be compared."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    for flags in (["--batch_size=2", "--name=a"], ["--learning_rate=0.5", "--dropout=0.1", "--name=b"]):
        run_dir, console = train_tiny(text_folder, "--max_steps=2", *flags)
        hparams = read_events(run_dir).PluginTagToContent("hparams")
        assert "_hparams_/experiment" not in hparams, "TensorBoard would show the columns of this run alone"
        start = plugin_data_pb2.HParamsPluginData.FromString(hparams["_hparams_/session_start_info"])
        changed = {name: value.number_value for name, value in start.session_start_info.hparams.items()}
        given = dict(flag[2:].split("=") for flag in [*TINY_FLAGS, "--max_steps=2", *flags[:-1]])
        assert changed["model_dim"] == 32
        assert set(changed) <= {*given, "num_samples"}
        for flag in flags[:-1]:
            name, value = flag[2:].split("=")
            assert changed[name] == float(value)
        scalars = read_scalars(run_dir)
        assert scalars["final/steps"] == {2: 2}
        assert 0 < scalars["final/minutes"][2] < 1
        assert f"{scalars['val/final_bits_per_byte'][2]:.3f}" in console.splitlines()[-2]


def test_random_weights_differ_by_seed():
    weights = [main.TrainingState(main.CONFIG(**TINY, seed=seed)).model.tok_embeddings.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert random_model(main.CONFIG(**TINY)) is not None
