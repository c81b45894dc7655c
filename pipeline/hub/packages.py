"""What a model asks for beyond transformers and torch: packages, and a device. Of its attention it is found here.

transformers finds that one is missing when it loads the weights, which may have been fetched for an hour by then.
Here that is known from config.json, without importing transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.quoting import quote

KERNELS = {"kernels": "kernels"}
# by attn_implementation
WITHOUT_PACKAGES = ("eager", "sdpa", "flex_attention")
ATTENTION: Mapping[str, Mapping[str, str]] = {
    "flash_attention_2": {"flash_attn": "flash-attn"},
    "flash_attention_3": {"flash_attn_interface": "flash-attn-3"},
    "flash_attention_4": {"flash_attn": "flash-attn-4"},
}


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without doing so."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or broken
        return False


@dataclass(frozen=True, slots=True)
class Need:
    """What a model asks for.

    Args:
        asked: in words that go on from the model's name.
        packages: what is installed for it, by the module that is then there.
        or_else: what helps instead, in words; empty where nothing does.
        least_gpu: the compute capability that it needs at least; None: no GPU.
    """

    asked: str
    packages: Mapping[str, str] = field(hash=False)
    or_else: str = ""
    least_gpu: tuple[int, int] | None = None


def needs_of_attention(config: Mapping[str, Any], name: str) -> tuple[Need, ...]:
    """What a model asks for in its config.json for its attention.

    Args:
        config: of config.json.
        name: of the model, for messages.

    Raises:
        ConfigurationError: something that no package gives.
    """
    found = [need for part in parts_of(config) for need in _of_attention(part, name)]
    return tuple(need for need in found if need.packages)


def check_needs(
    needs: Iterable[Need],
    name: str,
    *,
    machine: str | None = None,
    is_installed: Callable[[str], bool] = is_installed,
) -> None:
    """Check that what a model asks for is installed for this process.

    Args:
        needs: as `find_needs` gives them.
        name: of the model, for messages.
        machine: where this is, for messages; None where that is plain.
        is_installed: whether a module can be imported.

    Raises:
        ConfigurationError: something is not, and what to install.
    """
    for need in needs:
        if missing := [package for module, package in need.packages.items() if not is_installed(module)]:
            where = "" if machine is None else f" on machine {machine}"
            raise ConfigurationError(f"{name} {need.asked}: pip install {' '.join(missing)}{where}{need.or_else}")


def check_device(
    needs: Iterable[Need],
    name: str,
    *,
    capability: tuple[int, int] | None,
    machine: str | None = None,
) -> None:
    """Check that what a model asks for runs on a device.

    Args:
        needs: of the model.
        name: of the model, for messages.
        capability: the compute capability of the GPU; None: the device is a CPU.
        machine: where this is, for messages; None where that is plain.

    Raises:
        ConfigurationError: it does not, and what it needs.
    """
    for need in needs:
        if need.least_gpu is None or (capability is not None and capability >= need.least_gpu):
            continue
        major, minor = need.least_gpu
        wanted = f" of compute capability {major}.{minor} or more" if need.least_gpu > (0, 0) else ""
        here = "its device is a CPU" if capability is None else f"it has {capability[0]}.{capability[1]}"
        where = "" if machine is None else f" on machine {machine}"
        raise ConfigurationError(f"{name} {need.asked}: that needs a GPU{wanted}, and {here}{where}{need.or_else}")


def _of_attention(config: Mapping[str, Any], name: str) -> Iterator[Need]:
    for attention in _attentions(config):
        asked = f"asks for attn_implementation {quote(attention)[1:-1]} in its config.json"
        if "/" not in attention and attention not in (*ATTENTION, *WITHOUT_PACKAGES):
            known = ", ".join((*WITHOUT_PACKAGES, *ATTENTION))
            raise ConfigurationError(
                f"{name} {asked}, which transformers does not know: delete that key from config.json, or name one of "
                f"{known}"
            )
        packages = KERNELS if "/" in attention else ATTENTION.get(attention, {})
        yield Need(asked, packages, ", or delete that key from config.json")


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those within it, such as the language model's of a multimodal one."""
    yield config
    yield from (part for key, part in config.items() if key.endswith("_config") and isinstance(part, Mapping))


def _attentions(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("attn_implementation", "_attn_implementation"):
        stated = config.get(key)
        named = stated.values() if isinstance(stated, Mapping) else [stated]
        yield from (each.removeprefix("paged|") for each in named if isinstance(each, str))
