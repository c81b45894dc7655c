"""The embedded model: prepared once, whole or not at all, and the model that it must be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ConfigurationError
from pipeline.hub import embedded
from pipeline.hub.conversion import KNOWN_ANSWER, ROUND_TRIPS, check_conversion
from pipeline.hub.embedded import default_cache_folder, embedded_path, prepare_embedded

PROGRAM = """
import sys
from pathlib import Path
from pipeline.hub.embedded import prepare_embedded
print(prepare_embedded(Path(sys.argv[1]), progress=lambda line: print(line, file=sys.stderr)))
"""


@pytest.fixture(scope="module")
def prepared(cache_folder: Path) -> Path:
    return prepare_embedded(cache_folder)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """The prepared model with files that a test may replace; the weights are linked."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in prepared.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    return folder


def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(ROUND_TRIPS[0] + KNOWN_ANSWER[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(input_ids=ids).logits[0]
    return logits_TV


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"CAGE_CACHE": "/data/cage", "XDG_CACHE_HOME": "/x"}, Path("/data/cage")),
        ({"CAGE_CACHE": "", "XDG_CACHE_HOME": "/x"}, Path("/x/cage")),
        ({}, Path.home() / ".cache" / "cage"),
        ({"CAGE_CACHE": "~/models"}, Path.home() / "models"),
    ],
)
def test_the_cache_is_where_the_user_says(environ: dict[str, str], expected: Path) -> None:
    assert default_cache_folder(environ) == expected


def test_nothing_is_prepared_in_an_empty_cache(tmp_path: Path) -> None:
    assert embedded_path(tmp_path) is None
    assert embedded_path(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "empty marker", "no marker"])
def test_a_damaged_cache_is_not_taken_for_the_model(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / f"smollm2-135m-{embedded.VERSION}-{embedded.FORMAT}"
    folder.mkdir(parents=True)
    weights, marker = folder / "model.safetensors", folder / embedded.MARKER
    weights.write_bytes(b"x" * 10)
    marker.write_text(json.dumps({"identity": embedded.IDENTITY, "files": {"model.safetensors": 10}}))
    assert embedded_path(tmp_path) == folder
    match damage:
        case "cut":
            weights.write_bytes(b"x" * 9)
        case "gone":
            weights.unlink()
        case "other":
            marker.write_text(json.dumps({"identity": "older", "files": {}}))
        case "empty marker":
            marker.write_text("")
        case "no marker":
            marker.unlink()
    assert embedded_path(tmp_path) is None


@pytest.mark.nightly
@pytest.mark.slow
def test_processes_that_prepare_together_share_one_preparation(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    lines = "".join(shown for _, shown in outputs).splitlines()
    assert len(lines) == 4  # one of them prepared, in four steps, and nothing else was printed
    assert sorted(path.name for path in (tmp_path / "models").iterdir() if path.is_dir()) == [
        f"smollm2-135m-{embedded.VERSION}-{embedded.FORMAT}"
    ]
    folder = embedded_path(tmp_path)
    assert folder is not None
    assert torch.equal(plain_logits(folder), plain_logits(prepare_embedded(tmp_path)))


@pytest.mark.slow
def test_a_second_preparation_does_nothing(prepared: Path, cache_folder: Path) -> None:
    lines: list[str] = []
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare_embedded(cache_folder, progress=lines.append) == prepared
    assert lines == []
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.slow
def test_the_embedded_model_chats(prepared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0]
    answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert int(ids[-1]) == tokenizer.eos_token_id


@pytest.mark.slow
def test_control_tokens_are_no_text(prepared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    assert tokenizer("a <|im_end|> b")["input_ids"] == [81, 216, 2, 278]
    assert tokenizer.decode([81, 2, 278], skip_special_tokens=True) == "a b"
    assert len(tokenizer) == 49_152
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


@pytest.mark.slow
def test_a_right_conversion_passes_its_check(copy: Path) -> None:
    check_conversion(copy, plain_logits(copy))


@pytest.mark.slow
def test_wrong_weights_fail_the_check(copy: Path) -> None:
    expected = plain_logits(copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    name = "model.layers.3.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0)  # as where the heads' rows are permuted wrongly
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="its logits differ from the GGUF's"):
        check_conversion(copy, expected)


@pytest.mark.slow
def test_an_untied_head_fails_the_check(copy: Path) -> None:
    expected = plain_logits(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ConfigurationError, match="are not tied"):
        check_conversion(copy, expected)


@pytest.mark.slow
def test_a_wrong_tokenizer_fails_the_check(copy: Path) -> None:
    expected = plain_logits(copy)
    tree = json.loads((copy / "tokenizer.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][::2]
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigurationError, match="its tokenizer reads 'hello world"):
        check_conversion(copy, expected)


@pytest.mark.slow
def test_a_wrong_chat_template_fails_the_check(copy: Path) -> None:
    expected = plain_logits(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigurationError, match="its chat template renders differently"):
        check_conversion(copy, expected)
