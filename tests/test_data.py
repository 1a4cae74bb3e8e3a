"""The data: any bytes, any size, and a batch that depends on (seed, step, rank) only."""

import math
import os
import re
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
def test_the_chunks_are_the_file_in_its_order_and_only_the_last_one_is_filled_up(tmp_path, num_bytes):
    content = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", content), 16)
    assert len(dataset) == -(-num_bytes // 16)
    chunks = list(dataset)
    assert all(chunk.shape == (16,) and chunk.dtype == torch.int64 for chunk in chunks)
    assert bytes(torch.cat(chunks)[:num_bytes].tolist()) == content
    assert torch.cat(chunks)[num_bytes:].tolist() == [main.PAD] * (len(dataset) * 16 - num_bytes)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("num_bytes", [16, 17, 40])
def test_crops_begin_anywhere_as_often_as_anywhere_else_and_hold_no_padding(tmp_path, num_bytes):
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", bytes(range(num_bytes))), 16)
    crops = dataset.random_crops(0, 0, slice(None), 20_000)
    assert torch.equal(crops, crops[:, :1] + torch.arange(16))
    counts = crops[:, 0].bincount(minlength=num_bytes - 15)
    assert len(counts) == num_bytes - 15
    expected = 20_000 / len(counts)
    assert ((counts - expected).abs() < 5 * expected**0.5 + 1).all()


def test_the_part_of_a_file_is_the_file_of_that_part(tmp_path):
    part = main.ByteLevelTextDataset(write(tmp_path / "text", bytes(range(200))), 16, start=50, stop=100)
    alone = main.ByteLevelTextDataset(write(tmp_path / "alone", bytes(range(50, 100))), 16)
    assert torch.equal(torch.stack(list(part)), torch.stack(list(alone)))
    assert torch.equal(part.random_crops(1, 2, slice(None), 50), alone.random_crops(1, 2, slice(None), 50))


def test_all_byte_values_come_through_unchanged(tmp_path):
    content = b"\xef\xbb\xbf" + bytes(range(256)) + b"\r\n\x00\xff\xfe"
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", content), len(content))
    assert bytes(dataset[0].tolist()) == content


def test_a_batch_is_a_function_of_seed_and_step_and_each_process_takes_its_rows(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    dataset = main.ByteLevelTextDataset(write(tmp_path / "text", content), 16)
    whole = dataset.random_crops(0, 7, slice(0, 8), 8)
    parts = [dataset.random_crops(0, 7, slice(first, first + 2), 8) for first in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(dataset.random_crops(0, 8, slice(0, 8), 8), whole)
    assert not torch.equal(dataset.random_crops(1, 7, slice(0, 8), 8), whole)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(main.InputError, match="pipe: is missing or no regular file"):
        main.ByteLevelTextDataset(tmp_path / "pipe", 8)


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
dataset = main.ByteLevelTextDataset({str(path)!r}, 128)
dataset.random_crops(0, 0, slice(None), 16)
print(time.monotonic() - started)
for step in range(200): dataset.random_crops(0, step, slice(None), 16)
print((peak() - before) / 1024)
in_order = main.ByteLevelTextDataset({str(path)!r}, 128)
print(bytes(in_order[2**39 // 128].tolist())[:6].decode())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 1.0  # seconds
    assert float(out[1]) < 50  # MiB, while 3,200 random places of the file were read
    assert out[2] == "needle"


def test_missing_folder_and_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(main.InputError, match="nowhere.txt: is missing"):
        main.ByteLevelTextDataset(tmp_path / "nowhere.txt", 8)
    with pytest.raises(main.InputError, match="no regular file"):
        main.ByteLevelTextDataset(tmp_path, 8)


def test_the_starter_corpus_is_the_same_each_time_and_no_story_is_in_both_files(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    main.write_starter_corpus(config)
    train, validation = ((tmp_path / name).read_bytes() for name in ("train.txt", "validation.txt"))
    assert len(train) > 500_000
    assert 0.02 < len(validation) / len(train) < 0.3
    assert [train, validation] == main.starter_corpus()
    stories = [
        text.decode().removeprefix(main.STARTER_LINE.decode()).strip().split("\n\n") for text in (train, validation)
    ]
    assert len(set(stories[0] + stories[1])) == len(stories[0] + stories[1])
    for story in stories[0] + stories[1]:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.:!?\"]*[.!]", story), story
        assert "  " not in story


def test_a_starter_story_keeps_to_its_hero_from_the_first_sentence_to_the_last():
    homes = {"frog": "pond", "bear": "cave", "fox": "forest", "cat": "mill"}
    foods = {"frog": "flies", "bear": "honey", "fox": "berries", "cat": "fish"}
    story = main.Story(lambda alternatives: alternatives[0])
    assert story["opening"] == "Once there was a little fox named Mia who lived in the forest."
    assert story["They"] == "She"
    for story in main.starter_corpus()[1].decode().strip().split("\n\n")[1:]:
        heroes = set(homes) & set(story.split(".")[0].split())
        for hero in heroes:
            assert homes[hero] in story or foods[hero] in story
            assert not (set(homes.values()) - {homes[hero]}) & set(re.findall(r"\w+", story))
            assert not (set(foods.values()) - {foods[hero]}) & set(re.findall(r"\w+", story))
        assert (" she " in story) + (" he " in story) < 2
        assert len(set(re.findall(r"(Hugo|Nora|Clara|Bruno|Ida|Emil|Otto|Greta)", story))) <= 1


def test_no_model_can_know_more_of_the_starter_corpus_than_its_grammar():
    """The bits of a story's choices, over its bytes: README's 0.156, below which no bound can fall on average."""
    bits, random = 0, main.Random(1)

    def choose(alternatives):
        nonlocal bits
        bits += math.log2(len(alternatives))
        return random.choice(alternatives)

    length = sum(len(main.Story(choose)["story"]) + 2 for _ in range(20000))
    assert bits / length == pytest.approx(0.156, abs=0.0005)


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


def test_the_validation_text_is_the_one_beside_the_training_text(tmp_path):
    for name in ("train.txt", "validation.txt"):
        write(tmp_path / name, name.encode() * 100)
    train_set, validation_set = main.open_datasets(main.CONFIG(**TINY, train_data_file=str(tmp_path / "train.txt")))
    assert bytes(train_set.bytes) == b"train.txt" * 100
    assert bytes(validation_set.bytes) == b"validation.txt" * 100


def test_reading_does_not_keep_files_open(tmp_path):
    resource = pytest.importorskip("resource")
    path = write(tmp_path / "text", bytes(1000))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for _ in range(min(limit, 4096) + 10):
        main.ByteLevelTextDataset(path, 16)
