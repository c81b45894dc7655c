"""What hostile templates, inputs and configurations can do: an error in bounded time and memory, and nothing else."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jinja2.exceptions import SecurityError, UndefinedError
from transformers import AutoTokenizer

from pipeline.config.files import MAX_FILE_BYTES, MAX_VALUES, load_config, parse_config
from pipeline.config.sections import MAX_PRINCIPALS
from pipeline.errors import ConfigurationError
from pipeline.hub import template_limits
from pipeline.hub.chat_templates import render
from pipeline.hub.file_tokenizer import FileTokenizer
from pipeline.hub.template_limits import TemplateTooLong, limited
from pipeline.inputs import tabular

ROOT = Path(__file__).parent.parent
QUESTION = [{"role": "user", "content": "hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# ways out of a template that have worked in engines without a sandbox
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
)
CHANGES = ("{{ messages.append(1) }}", "{{ messages[0].update({'role': 'system'}) }}", "{{ messages.clear() }}")


def renderers(folder):
    """Every way in which a chat template is rendered: by the plan, and by a run's and a judge's tokenizers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file_tokenizer = FileTokenizer(Path(folder) / "tokenizer.json", {})
    yield lambda template: render(template, QUESTION, {})
    for each in (tokenizer, file_tokenizer):
        yield lambda template, each=each: each.apply_chat_template(
            list(QUESTION), chat_template=template, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.parametrize("template", [*ESCAPES, *CHANGES])
def test_a_template_reaches_nothing_but_its_values(tiny, template):
    for rendered in renderers(tiny()):
        try:
            text = rendered(template)
        except (SecurityError, UndefinedError):
            text = ""
        assert text.strip() == ""  # what it asked for is undefined
    assert QUESTION == [{"role": "user", "content": "hello"}]


def test_every_template_is_rendered_within_the_limits():
    """Each call of `apply_chat_template` stands within `limited`, or is of the package's own embedded model."""
    bare = []
    for file in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/**/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        within = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("limited", "partial")
            for inner in ast.walk(node)
        }
        bare += [
            file.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template" and id(node) not in within
        ]
    assert bare == ["conversion.py"]


@pytest.mark.parametrize("is_main", [True, False])
def test_a_template_without_end_is_interrupted_in_its_own_thread(monkeypatch, is_main):
    monkeypatch.setattr(template_limits, "LOOK_S", 0.05)
    ends = []

    def run():
        for template in (ENDLESS, "{{ messages[0].content }}", ENDLESS):
            try:
                ends.append(limited(lambda template=template: render(template, QUESTION, {}), cpu_s=0.2))
            except TemplateTooLong as error:
                ends.append(str(error))

    if is_main:
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert ends == ["it did not end within 0.2 s of CPU time", "hello", "it did not end within 0.2 s of CPU time"]
    time.sleep(0.1)  # nothing is raised afterwards


def test_waiting_is_not_counted_and_a_swallowed_interruption_is_raised_again(monkeypatch):
    monkeypatch.setattr(template_limits, "LOOK_S", 0.01)

    def wait():
        time.sleep(0.4)
        return "done"

    def swallow():
        try:
            while True:
                pass
        except TemplateTooLong:
            return "swallowed"

    assert limited(wait, cpu_s=0.2) == "done"
    with pytest.raises(TemplateTooLong, match=r"0\.2 s"):
        limited(swallow, cpu_s=0.2)


def test_a_template_that_writes_too_much_is_refused():
    with pytest.raises(TemplateTooLong, match="101 characters, more than 100"):
        limited(lambda: "x" * 101, characters=100)


def test_a_rows_endless_template_is_the_rows_error(tiny, tmp_path, monkeypatch):
    from support.runs import job, run_job

    monkeypatch.setattr(template_limits, "LOOK_S", 0.05)
    monkeypatch.setattr(template_limits.limited, "__kwdefaults__", {"cpu_s": 0.3, "characters": 10_000})
    rows = [{"id": name, "prompt": name} for name in ("good", "endless", "long", "fine")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = (
        "{% set text = messages[-1].content %}{{ text }}"
        f"{{% if 'endless' in text %}}{ENDLESS}{{% endif %}}"
        "{% if 'long' in text %}{{ 'x' * 20000 }}{% endif %}"
    )
    base = {"model": str(tiny()), "chat_template": template}
    config = job(tmp_path / "prompts.jsonl", tmp_path / "run", "x", errors={"budget": 2})
    config = config.model_copy(update={"base": config.base.model_validate(base)})
    run, _ = run_job(config, tmp_path)
    errors = {name: run.find(name)[0]["error"] for name in ("good", "endless", "long", "fine")}
    assert errors["good"] is errors["fine"] is None
    assert "did not end within 0.3 s" in errors["endless"]
    assert "more than 10,000" in errors["long"]


def test_a_configuration_is_measured_before_it_is_parsed(tmp_path):
    file = tmp_path / "job.yaml"
    one = "  p{at}: {{kind: prompted, principle: be kind}}\n"
    with file.open("w") as out:
        out.write("input: {path: a}\noutput: {path: b}\nprincipals:\n")
        out.writelines(one.format(at=at) for at in range(10**6))
    started_s = time.process_time()
    with pytest.raises(ConfigurationError, match=f"a configuration has at most {MAX_FILE_BYTES:,}"):
        load_config(file)
    assert time.process_time() - started_s < 1


def test_aliases_that_repeat_each_other_are_counted_and_not_expanded(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]" for at in range(1, 12)]
    file = tmp_path / "job.yaml"
    file.write_text("\n".join([*lines, "input: *a11", "output: {path: b}"]))
    with pytest.raises(ConfigurationError, match=f"more than {MAX_VALUES:,} values"):
        load_config(file)
    file.write_text("input: &me {path: *me}\noutput: {path: b}")
    with pytest.raises(ConfigurationError, match=f"more than {MAX_VALUES:,} values"):
        load_config(file)


def test_there_are_at_most_so_many_principals():
    principals = {f"p{at}": {"kind": "prompted", "principle": "be kind"} for at in range(MAX_PRINCIPALS + 1)}
    tree = {"input": {"path": "a"}, "output": {"path": "b"}, "principals": principals}
    with pytest.raises(ConfigurationError, match="principals has too many entries"):
        parse_config(tree)
    del principals["p0"]
    assert len(parse_config(tree).principals) == MAX_PRINCIPALS


READ = """
import resource, sys
from pipeline.config.files import parse_config
from pipeline.inputs.source import open_input
config = parse_config({"input": {"path": sys.argv[1], "prompt": "prompt"}, "output": {"path": "unused"}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_input(config.input)
rows = source.read_rows(0, 0, int(sys.argv[2]))
found = [(row.error or "", sum(len(str(each["content"])) for each in row.messages)) for row in rows]
print(len(found), max(size for _, size in found), found[-1][0][:80])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MiB")
"""


def read(path, num_rows):
    """What a process of its own reads of an input, and by how much its memory grew, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(num_rows)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    return first, int(second.split()[0])


@pytest.mark.slow
def test_a_line_of_any_length_takes_the_memory_of_the_longest_that_is_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "hello"}\n')
        file.seek(700 * 2**20)  # a hole: it takes no place on the disk
        file.write(b'\n{"prompt": "goodbye"}\n')
    found, grown = read(path, 3)
    assert found.startswith("3 7")
    assert grown < 300


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_an_honest_column_is_bounded_by_its_dictionary_and_not_by_its_size(tmp_path, compression):
    """Writers begin a dictionary and give it up at a megabyte: such a column is long, its longest value is not."""
    path = tmp_path / "prompts.parquet"
    texts = {"different": [f"{at:0340d}" for at in range(12000)], "long": ["x" * 300_000] * 12000}
    pq.write_table(pa.table(texts), path, compression=compression)
    group = pq.ParquetFile(path).metadata.row_group(0)
    with path.open("rb") as handle:
        different, long = (tabular._dictionary_bytes(handle, group.column(at)) for at in range(2))
        assert tabular._batch_rows(handle, group, ["different"]) > 200
    assert different < 2**21 < group.column(0).total_uncompressed_size
    assert 300_000 < long < 300_100


@pytest.mark.slow
def test_a_parquet_file_that_stands_for_terabytes_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "prompts.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 500_000, pa.int32()), ["x" * 2**21])
    pq.write_table(pa.table({"prompt": texts}), path, compression="zstd")
    assert path.stat().st_size < 2**20  # of 10**12 characters
    found, grown = read(path, 300)
    assert found.startswith(f"300 {2**21}")
    assert grown < 1500


def test_the_claims_of_the_threat_model_name_tests_that_exist():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    section = page[page.index("## Security") :]
    section = section[: section.index("\n## ", 4)]
    named = re.findall(r"`(tests/test_\w+\.py)::(\w+)`", section)
    assert len(named) >= 20
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    kinds = set(re.findall(r"^\| (an? [\w ]+) \|", section, flags=re.MULTILINE))
    assert kinds == {
        "an input row", "an input file", "a configuration", "a model folder", "an adapter", "a chat template",
        "an object store", "an endpoint",
    }  # fmt: skip
