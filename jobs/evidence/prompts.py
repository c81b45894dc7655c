"""Prompts for the evidence, written from templates: 1,000 to train on, 100 to look at rewards, 200 that are held out.

No data set of prompts comes with the project, so these are its own: 60 things and 60 activities, ten questions
about each. The subjects that are held out are the last ten of each list. The 100 ask one more question about each
subject that is not.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

THINGS = (
    "a cup of coffee", "a bicycle", "an umbrella", "a wooden chair", "a library card", "a raincoat", "a houseplant",
    "a kitchen knife", "a notebook", "a train ticket", "a wool blanket", "a bowl of soup", "a loaf of bread",
    "a guitar", "a chessboard", "a telescope", "a garden shed", "a tent", "a map", "a rowing boat", "a pair of boots",
    "a candle", "a beehive", "a violin", "a snow shovel", "a fountain pen", "a postcard", "a clay pot", "a kite",
    "a hammock", "a sewing machine", "a camera", "a jigsaw puzzle", "a bus stop", "an old radio", "a glass of water",
    "a cheese sandwich", "a thermometer", "a wristwatch", "a laptop", "a flashlight", "a birdhouse", "a ladder",
    "a hot bath", "a cardboard box", "a fire extinguisher", "a mirror", "a rubber band", "a dictionary", "a spoon",
    "a compass", "a teapot", "a scarf", "a doorbell", "a piano", "a lighthouse", "a lawnmower", "a suitcase",
    "a calendar", "a bonfire",
)  # fmt: skip
ACTIVITIES = (
    "learning to swim", "baking bread", "moving to a new town", "walking to work", "keeping a diary",
    "growing tomatoes", "playing chess", "running a marathon", "writing letters", "reading old novels",
    "cleaning the kitchen", "meeting the neighbours", "sleeping in a tent", "repairing a bicycle",
    "starting a book club", "getting up early", "cooking for friends", "learning Spanish", "giving a speech",
    "painting a room", "adopting a cat", "working at night", "saving money", "volunteering at a hospital",
    "taking the night train", "watching birds", "singing in a choir", "fasting for a day", "planting a tree",
    "changing jobs", "hiking in the rain", "visiting a museum", "driving in the city", "knitting a sweater",
    "living alone", "going to the dentist", "studying for an exam", "teaching children", "fishing in a lake",
    "selling old clothes", "waiting in a queue", "using public transport", "sorting photographs", "doing nothing",
    "arguing with a friend", "camping in winter", "writing a poem", "learning the piano", "skipping breakfast",
    "shopping for shoes", "making soup", "riding a horse", "planning a wedding", "washing the car",
    "listening to the radio", "swimming in the sea", "building a fence", "sharing a flat", "quitting sugar",
    "climbing a hill",
)  # fmt: skip
ABOUT_THINGS = (
    "Describe {} in two sentences.", "What is {} good for?", "Write a short note to a friend about {}.",
    "What could go wrong with {}?", "Why do people like {}?", "Give one piece of advice about {}.",
    "Tell me something about {}.", "What should I know before I get {}?", "Is {} worth its price?",
    "Write two sentences for a shop that sells {}.",
)  # fmt: skip
ABOUT_ACTIVITIES = (
    "What is {} like?", "How do I begin with {}?", "Is {} worth the time?", "What is hard about {}?",
    "Write two sentences about {}.", "What do people say about {}?", "I am thinking about {}. What do you say?",
    "Why would anyone avoid {}?", "Write a message to a colleague about {}.", "What does one need for {}?",
)  # fmt: skip
MORE_ABOUT_THINGS = (
    "How do I take care of {}?", "Who needs {}?", "Compare {} with something similar.",
    "What is the best thing about {}?", "Write a complaint about {}.",
)  # fmt: skip
MORE_ABOUT_ACTIVITIES = (
    "How long does {} take?", "What is the best thing about {}?", "Write a short story about {}.",
    "What did people think of {} a hundred years ago?", "Persuade me that {} is a good idea.",
)  # fmt: skip
KINDS = (
    ("thing", THINGS, ABOUT_THINGS, MORE_ABOUT_THINGS),
    ("activity", ACTIVITIES, ABOUT_ACTIVITIES, MORE_ABOUT_ACTIVITIES),
)
NUM_HELD_OUT = 10  # subjects of each list


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with a name that is unique among all of them."""

    id: str
    prompt: str


def write_prompts(folder: Path, *, training: int, advise: int, held_out: int, seed: int) -> None:
    """Write `train-a.jsonl`, `train-b.jsonl`, `advise.jsonl` and `held_out.jsonl`, in an order that `seed` fixes.

    Args:
        folder: where to.
        training: prompts of both training files together, half in each; no prompt is in two files.
        advise: prompts on which rewards are looked at.
        held_out: prompts on which answers are judged.
        seed: of the order; smaller numbers take the first prompts of the same order.

    Raises:
        ValueError: more prompts than there are.
    """
    all_training, all_held_out = split(seed)
    more = questions_more(seed)
    for asked, name, there in (
        (training, "training", len(all_training)),
        (advise, "advise", len(more)),
        (held_out, "held_out", len(all_held_out)),
    ):
        if not 0 < asked <= there:
            raise ValueError(f"{name} must be 1 to {there}, as many prompts as there are; got {asked}")
    folder.mkdir(parents=True, exist_ok=True)
    half = training // 2
    _write(folder / "train-a.jsonl", all_training[:half])
    _write(folder / "train-b.jsonl", all_training[half:training])
    _write(folder / "advise.jsonl", more[:advise])
    _write(folder / "held_out.jsonl", all_held_out[:held_out])


def split(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and the held-out ones, each in random order."""
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for kind, subjects, templates, _ in KINDS:
        for number, subject in enumerate(subjects):
            side = sides[number >= len(subjects) - NUM_HELD_OUT]
            side += [
                Prompt(f"{kind}-{number:02}-{at}", template.format(subject)) for at, template in enumerate(templates)
            ]
    for side in sides:
        random.Random(seed).shuffle(side)
    return sides


def questions_more(seed: int) -> list[Prompt]:
    """One more question about each subject that is not held out, in random order."""
    found = [
        Prompt(f"{kind}-{number:02}-more", templates[number % len(templates)].format(subject))
        for kind, subjects, _, templates in KINDS
        for number, subject in enumerate(subjects[:-NUM_HELD_OUT])
    ]
    random.Random(seed).shuffle(found)
    return found


def _write(path: Path, prompts: list[Prompt]) -> None:
    lines = [json.dumps({"id": each.id, "prompt": each.prompt}) + "\n" for each in prompts]
    path.write_text("".join(lines), encoding="utf-8")
