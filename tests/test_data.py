"""The data: any bytes, any size, every byte once an epoch, and a batch that depends on (seed, step, rank) only."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import main


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("num_bytes", [0, 1, 15])
def test_a_file_shorter_than_one_sequence_is_refused_with_both_sizes(tmp_path, num_bytes):
    path = write(tmp_path / "text", b"x" * num_bytes)
    with pytest.raises(main.InputError, match=rf"text: {num_bytes} bytes .* max_length=16"):
        main.ByteLevelTextDataset(path, 16)


@pytest.mark.parametrize("num_bytes", [16, 17, 31, 32, 33, 1000])
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_an_epoch_visits_every_byte_once(tmp_path, num_bytes, seed):
    content = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", content), 16, seed)
    assert len(dataset) == -(-num_bytes // 16)
    for epoch in range(3):
        sequences = [dataset[epoch * len(dataset) + i] for i in range(len(dataset))]
        assert all(s.shape == (16,) and s.dtype == torch.int64 for s in sequences)
        seen = torch.cat(sequences)
        assert sorted(seen[seen != main.PAD].tolist()) == sorted(content)
        assert (seen == main.PAD).sum() == len(dataset) * 16 - num_bytes


def test_every_position_is_visited_once_not_only_every_value(tmp_path):
    numbers = np.arange(0, 5000, dtype="<u2")  # the bytes at 2i and 2i + 1 tell i
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", numbers.tobytes()), 64, seed=1)
    starts = []
    for i in range(len(dataset)):
        values = dataset[i]
        values = values[values != main.PAD].numpy().astype(np.uint8)
        whole = b"".join([numbers.tobytes()] * 2)
        starts.append(whole.index(values.tobytes()) % len(numbers.tobytes()))
    assert len(set(starts)) == len(dataset)


def test_all_byte_values_come_through_unchanged(tmp_path):
    content = b"\xef\xbb\xbf" + bytes(range(256)) + b"\r\n\x00\xff\xfe"
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", content), len(content))
    assert bytes(dataset[0].tolist()) == content


def test_epochs_are_cut_and_ordered_anew(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", content), 16, seed=0)
    epochs = [[tuple(dataset[e * len(dataset) + i].tolist()) for i in range(len(dataset))] for e in range(2)]
    assert not set(epochs[0]) & set(epochs[1])  # a new phase: no piece comes back
    in_order = main.ByteLevelTextDataset(tmp_path / "text", 16)
    assert bytes(torch.cat(list(in_order)).tolist()) == content


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_shuffle_is_a_bijection_that_moves_things_about(size):
    keys = np.random.SeedSequence(size).generate_state(4, np.uint64)
    order = main.permute(np.arange(size), size, keys)
    assert sorted(order) == list(range(size))
    if size >= 1000:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.1
        assert (np.diff(order) == 1).mean() < 0.01


def test_the_dataloader_gives_what_the_dataset_gives_with_and_without_workers(tmp_path, config):
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", bytes(range(256)) * 4), config.max_length, seed=0)
    expected = [dataset.__getitems__(rows) for rows, _ in zip(main.batch_indices(config, 3), range(6), strict=False)]
    for workers in (0, 2):
        loader = main.data_loader(dataset, main.CONFIG(**TINY, num_workers=workers), first_step=3)
        for batch, wanted in zip(loader, expected, strict=False):
            assert torch.equal(batch, wanted)
    assert len(pickle.dumps(dataset)) < 1000  # a spawned worker gets the path, not the text


def test_a_batch_is_a_function_of_seed_step_and_rank(tmp_path, config, monkeypatch):
    def rows(step, rank, world):
        monkeypatch.setattr(main, "rank", lambda: rank)
        monkeypatch.setattr(main, "world_size", lambda: world)
        local = main.CONFIG(**{**TINY, "batch_size": 8 // world})
        return list(next(main.batch_indices(local, step)))

    assert rows(5, 0, 2) + rows(5, 1, 2) == rows(5, 0, 1)
    assert rows(5, 0, 1) != rows(6, 0, 1)


def test_short_sequences_come_at_their_share_and_in_few_lengths(config):
    config = main.CONFIG(**{**TINY, "max_length": 128}, random_length_prob=0.1)
    lengths = [main.sequence_length(config, step) for step in range(3000)]
    assert set(lengths) == {128, 64, 32, 16}
    assert sum(length < 128 for length in lengths) == pytest.approx(300, abs=60)
    never = main.CONFIG(**{**TINY, "max_length": 128}, random_length_prob=0.0)
    assert {main.sequence_length(never, step) for step in range(500)} == {128}


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files and /proc")
def test_a_sparse_terabyte_starts_at_once_and_takes_no_memory(tmp_path):
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(2**40)
        file.seek(2**39)
        file.write(b"needle")
    code = f"""
import sys, time, resource
sys.path.insert(0, {str(ROOT)!r})
import main
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, started = peak(), time.monotonic()
dataset = main.ByteLevelTextDataset({str(path)!r}, 128, seed=0)
dataset.__getitems__(range(16))
print(time.monotonic() - started)
for step in range(200): dataset.__getitems__(range(16 * step, 16 * step + 16))
print((peak() - before) / 1024)
in_order = main.ByteLevelTextDataset({str(path)!r}, 128)
print(bytes(in_order[2**39 // 128].tolist())[:6].decode())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1.0  # seconds
    assert float(out[1]) < 50  # MiB, while 3,200 random places of the file were read
    assert out[2] == "needle"


def test_missing_folder_and_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(main.InputError, match="nowhere.txt: cannot be read"):
        main.ByteLevelTextDataset(tmp_path / "nowhere.txt", 8)
    with pytest.raises(main.InputError, match="cannot be read"):
        main.ByteLevelTextDataset(tmp_path, 8)


def test_the_starter_corpus_is_real_text_with_no_topic_in_both_files(tmp_path, monkeypatch, config):
    from pydoc_data.topics import topics

    monkeypatch.chdir(tmp_path)
    main.write_starter_corpus(config)
    train, validation = (tmp_path / "train.txt").read_text("utf-8"), (tmp_path / "validation.txt").read_text("utf-8")
    for text in topics.values():
        assert (text.strip() in train) != (text.strip() in validation)
    assert 0.02 < len(validation) / len(train) < 0.3


def test_existing_files_are_never_written_to(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    for present in ("train.txt", "validation.txt"):
        write(tmp_path / present, b"mine")
        main.write_starter_corpus(config)
        assert (tmp_path / present).read_bytes() == b"mine"
        assert len(list(tmp_path.iterdir())) == 1
        (tmp_path / present).unlink()


def test_without_validation_text_the_end_of_the_training_text_is_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = bytes(i % 251 for i in range(2000))
    write(tmp_path / "train.txt", content)
    train_set, validation_set = main.open_datasets(main.CONFIG(**TINY))
    assert bytes(train_set.bytes) + bytes(validation_set.bytes) == content
    assert len(validation_set.bytes) == 100
    assert "last 5 % of train.txt are held out" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_does_not_keep_files_open(tmp_path):
    resource = pytest.importorskip("resource")
    path = write(tmp_path / "text", bytes(1000))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for _ in range(min(limit, 4096) + 10):
        main.ByteLevelTextDataset(path, 16)
