"""The checker of stories, tests/tools/stories.py: what the starter corpus' grammar can tell, and what it cannot."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from stories import judge

import main


def stories():
    return main.starter_corpus()[1].decode().strip().split("\n\n")[1:]  # the first line is a notice


def test_every_story_of_the_corpus_is_valid_and_so_is_every_beginning_of_one():
    for number, story in enumerate(stories()):
        assert judge(story + "\n\n") == (True, len(story) + 2, True), story
        beginning = story[: number % len(story)]
        assert judge(beginning)[0], beginning


@pytest.mark.parametrize("are_names_free", [False, True])
def test_one_changed_pronoun_name_home_or_deed_is_noticed_unless_names_are_free(are_names_free):
    number = 0
    for story in stories():
        for pattern, other in ((r"\b[hH]e\b", "she"), (r"\bMia\b", "Tom"), (r"the (?:forest|cave)\.", "the pond.")):
            changed = re.sub(pattern, other, story, count=1)
            if changed == story or (other == "Tom" and story.count("Mia") < 2):
                continue
            number += 1
            is_valid, before_the_slip, _ = judge(changed, are_names_free)
            if pattern != r"\b[hH]e\b" or " he " in story:  # "He" becomes "she" without its capital letter
                assert is_valid is are_names_free, changed
            if not is_valid:
                assert before_the_slip < len(changed)
    assert number > 50


@pytest.mark.parametrize(
    "text", ["Once upon", "Once there was a shy fxo", "A shy fox named Mia lived in the cave.", "once"]
)
def test_what_the_grammar_cannot_say_is_no_story(text):
    is_valid, before_the_slip, is_whole = judge(text)
    assert not is_valid
    assert not is_whole
    assert 0 <= before_the_slip < len(text)


def test_a_second_story_after_the_first_is_judged_by_itself():
    first, second = stories()[:2]
    assert judge(f"{first}\n\n{second[:50]}") == (True, len(first) + 52, True)
    assert judge(f"{first}\n\n{second[:50]}#")[:2] == (False, len(first) + 52)
    assert not judge(f"{first[:60]}\n\n{second}")[0], "an end too soon"


def test_a_prompt_with_its_story_fits_into_the_default_context():
    longest = max(len(story) for text in main.starter_corpus() for story in text.decode().split("\n\n"))
    assert len("\n\n") + longest + len("\n\n") <= main.CONFIG(device="cpu").max_length
