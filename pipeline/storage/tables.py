"""Records become Arrow tables, and tables become bytes: the same table always gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.sections import Trace
from pipeline.inputs.tool_use import as_stored
from pipeline.records import FAILED_COLUMNS, Record

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGES_WITH_TOOLS = pa.list_(
    pa.struct([*MESSAGE, ("tool_calls", pa.list_(CALL)), ("tool_call_id", pa.string()), ("name", pa.string())])
)


def output_schema(
    principal_names: Sequence[str],
    *,
    trace: Trace = Trace.SUMMARY,
    has_response: bool = False,
    has_variants: bool = False,
    has_units: bool = False,
    has_temperatures: bool = False,
    has_tools: bool = False,
    has_reasoning: bool = False,
    has_proposals: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> pa.Schema:
    """The columns of an output file, in order.

    Parquet has no empty struct: without principals the columns weights, rewards, payments, original_rewards, chosen
    and rejected, and payments and thresholds of a traced token, are left out.

    Args:
        principal_names: the fields of the structs, in this order.
        trace: `tokens` adds the column tokens.
        has_tools: adds tools as JSON text, and to the messages of prompt and messages calls of tools, whose arguments
            are JSON text, and what answers to calls name.
        has_variants: adds variant, rule and agent_temperature.
        has_units: adds game_unit.
        has_temperatures: adds draw_temperature.
        has_reasoning: adds reasoning and num_reasoning_tokens.
        has_proposals: adds proposals.
        has_response: adds original_response, original_rewards, chosen and rejected.
        metadata: carried by the schema and by every column ("cage.digest"); an entry "cage.models.principals.NAME..."
            also by the fields of that principal.
    """
    carried = dict(sorted((metadata or {}).items()))
    by_principal = _by_principal(principal_names, carried)
    fields = [
        pa.field("row_id", pa.string()),
        pa.field("sample", pa.int32()),
        *(_variant_fields() if has_variants else []),
        *([pa.field("game_unit", pa.string())] if has_units else []),
        *([pa.field("draw_temperature", pa.float64())] if has_temperatures else []),
        pa.field("prompt", MESSAGES_WITH_TOOLS if has_tools else MESSAGES),
        pa.field("completion", MESSAGES),
        pa.field("messages", MESSAGES_WITH_TOOLS if has_tools else MESSAGES),
        *([pa.field("tools", pa.string())] if has_tools else []),
        pa.field("response", pa.string()),
        *([pa.field("reasoning", pa.string())] if has_reasoning else []),
        pa.field("finish_reason", pa.string()),
        pa.field("num_tokens", pa.int32()),
        *([pa.field("num_reasoning_tokens", pa.int32())] if has_reasoning else []),
        *(pa.field(name, by_principal) for name in ("weights", "rewards", "payments") if principal_names),
        pa.field("kl_per_token", pa.float64()),
        pa.field("covered_mass", pa.float64()),
        pa.field("max_residual", pa.float64()),
        pa.field("num_unsolved", pa.int32()),
        pa.field("solver_steps", pa.float64()),
        pa.field("error", pa.string()),
    ]
    if has_response:
        fields.append(pa.field("original_response", pa.string()))
        if principal_names:
            fields.append(pa.field("original_rewards", by_principal))
            fields += [pa.field("chosen", MESSAGES), pa.field("rejected", MESSAGES)]
    if has_proposals:
        fields.append(pa.field("proposals", pa.list_(_proposal(by_principal, principal_names))))
    if trace is Trace.TOKENS:
        fields.append(pa.field("tokens", pa.list_(_token(by_principal, principal_names))))
    common = {key: value for key, value in carried.items() if not key.startswith("cage.models.principals.")}
    return pa.schema([field.with_metadata(common) for field in fields], metadata=carried)


def failed_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a file of failed rows: those of the answers, the row's place in the input and what it was given.

    `given` is null where the row could be read.
    """
    for name, type_ in zip(FAILED_COLUMNS, (pa.string(), pa.int64(), pa.string()), strict=True):
        schema = schema.append(pa.field(name, type_))
    return schema


def to_table(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """A table with one row per record, in the order given; columns that `schema` lacks are dropped."""
    rows = [_row(record) for record in records]
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)


def write_table_bytes(table: pa.Table, *, metadata: Mapping[str, str] | None = None) -> bytes:
    """A Parquet file. The same table gives the same bytes with one version of pyarrow, however it is chunked.

    `metadata` is added to that of the table's schema.
    """
    merged = {**(table.schema.metadata or {}), **{k.encode(): v.encode() for k, v in (metadata or {}).items()}}
    table = table.combine_chunks().replace_schema_metadata(dict(sorted(merged.items())) or None)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, version="2.6", data_page_version="1.0", compression="zstd") as writer:
        if table.num_rows:  # `datasets` cannot read a row group without rows
            writer.write_table(table, row_group_size=table.num_rows)
    return bytes(sink.getvalue())


def _variant_fields() -> list[pa.Field]:
    return [
        pa.field("variant", pa.int32()),
        pa.field("rule", pa.string()),
        pa.field("agent_temperature", pa.float64()),
    ]


def _by_principal(principal_names: Sequence[str], metadata: Mapping[str, str]) -> pa.StructType:
    """A struct with one double per principal; each field carries the identities of that principal's models."""
    fields = []
    for name in principal_names:
        place = f"cage.models.principals.{name}."
        models = {key: value for key, value in metadata.items() if key.startswith(place)}
        fields.append(pa.field(name, pa.float64(), metadata=models or None))
    return pa.struct(fields)


def _proposal(by_principal: pa.StructType, principal_names: Sequence[str]) -> pa.StructType:
    fields = [
        pa.field("game", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("count", pa.int32()),
        pa.field("probability", pa.float64()),
        pa.field("is_chosen", pa.bool_()),
    ]
    return pa.struct([*fields, *([pa.field("rewards", by_principal)] if principal_names else [])])


def _token(by_principal: pa.StructType, principal_names: Sequence[str]) -> pa.StructType:
    fields = [
        pa.field("token_id", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("base_logprob", pa.float64()),
        pa.field("logprob", pa.float64()),
    ]
    by_name = [pa.field(name, by_principal) for name in ("payments", "thresholds") if principal_names]
    return pa.struct([*fields, *by_name])


def _row(record: Record) -> dict[str, Any]:
    prompt = [as_stored(message) for message in record.prompt]
    completion = _answer(record.response)
    return {
        "row_id": record.row_id,
        "sample": record.sample,
        "variant": record.variant,
        "rule": record.rule,
        "agent_temperature": record.agent_temperature,
        "game_unit": record.unit,
        "draw_temperature": record.temperature,
        "prompt": prompt,
        "completion": completion,
        "messages": None if completion is None else prompt + completion,
        "tools": json.dumps(record.tools, ensure_ascii=False) if record.tools else None,
        "response": record.response,
        "reasoning": record.reasoning,
        "num_reasoning_tokens": record.num_reasoning_tokens,
        "finish_reason": str(record.finish_reason),
        "num_tokens": record.num_tokens,
        "weights": dict(record.weights),
        "rewards": dict(record.rewards),
        "payments": dict(record.payments),
        "kl_per_token": record.kl_per_token,
        "covered_mass": record.covered_mass,
        "max_residual": record.max_residual,
        "num_unsolved": record.num_unsolved,
        "solver_steps": record.solver_steps,
        "error": None if record.error is None else _storable(record.error),
        "original_response": record.original_response,
        "original_rewards": None if record.original_rewards is None else dict(record.original_rewards),
        "chosen": _answer(record.chosen),
        "rejected": _answer(record.rejected),
        "proposals": [{**asdict(each), "rewards": dict(each.rewards)} for each in record.proposals],
        "tokens": [_traced(token) for token in record.tokens],
        "input_file": record.file or None,
        "input_row": record.number,
        "given": record.given,
    }


def _storable(text: str) -> str:
    """Text without lone surrogates: a message about a bad row must not cost the shard."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _answer(text: str | None) -> list[dict[str, str]] | None:
    return None if text is None else [{"role": "assistant", "content": text}]


def _traced(token: Any) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "text": token.text,
        "base_logprob": token.base_logprob,
        "logprob": token.logprob,
        "payments": dict(token.payments),
        "thresholds": dict(token.thresholds),
    }
