"""From the name of a model in a configuration to its files, found and checked before any weights are loaded."""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pipeline.errors import ConfigurationError
from pipeline.hub import embedded
from pipeline.hub.huggingface import fetch_hub_adapter, fetch_hub_model, resolve_on_hub
from pipeline.hub.packages import Need, check_needs, parts_of
from pipeline.hub.preference_adapters import PreferenceForm, read_form
from pipeline.hub.quantisation import KINDS, computing_packages, find_needs, need_of_kind, stored_method
from pipeline.hub.remote import fetch, list_remote
from pipeline.hub.weight_files import (
    ADAPTER_CONFIG,
    CONFIG,
    TRAINING_FACTS,
    FileTree,
    Inventory,
    LocalTree,
    ModelFiles,
    find_adapter_files,
    find_model_files,
    read_json,
    take_inventory,
)
from pipeline.quoting import one_line
from pipeline.sections import EMBEDDED_MODEL, ModelConfig
from pipeline.sections import QuantizationKind as Kind

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# what an adapter's configuration may say that products of low rank, token by token, cannot do
MORE_THAN_LORA = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "target_parameters", "trainable_token_indices", "layer_replication",
)  # fmt: skip
# ways to begin that change the weights of the model itself, for all of its roles
CHANGES_THE_MODEL = ("pissa", "olora", "loftq", "corda", "lora_ga")
Progress = Callable[[str], None]


def _silent(line: str) -> None:
    """Show no progress."""


class Location(StrEnum):
    EMBEDDED = "embedded"
    FOLDER = "folder"
    HUB = "hub"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that exists. Picklable.

    Attributes:
        name: as the configuration names it.
        location: where that is.
        path: folder on the resolving machine with configuration and tokenizer; with the weights too where the
            location is EMBEDDED or FOLDER. `fetch_weights` gives the whole folder on any machine.
        revision: the commit on the hub; None elsewhere.
        identity: fingerprint of the content.
        num_parameters_by_dtype: as stored, by safetensors' dtype names.
        trust_remote_code: whether code of the model's own is run.
        needs: packages and devices that it asks for, wherever it is loaded.
        quantisation: transformers' name of the way in which its weights are quantised, in its files or while they
            are loaded; None of ordinary weights.
        kind: how its weights are quantised while they are loaded, if they are.
    """

    name: str
    location: Location
    path: str
    revision: str | None
    identity: str
    num_parameters_by_dtype: Mapping[str, int] = field(hash=False)
    trust_remote_code: bool = False
    needs: tuple[Need, ...] = ()
    quantisation: str | None = None
    kind: Kind | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        """The distributions that compute with its quantised weights: what they round changes with their versions."""
        return () if self.quantisation is None else computing_packages(self.quantisation)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A PEFT LoRA adapter that exists.

    Attributes:
        rank: of its products; of one that depends on a preference vector with all of its objectives.
        backbone: the model that it says it was trained on.
        form: set where it depends on a preference vector.
        objective: whose unit vector such an adapter is used at; None: at any.
        trained_on: the identity of its backbone, where `cage train` has made it.
    """

    name: str
    location: Location
    path: str
    revision: str | None
    identity: str
    num_parameters_by_dtype: Mapping[str, int] = field(hash=False)
    rank: int
    backbone: str | None
    form: PreferenceForm | None = None
    objective: int | None = None
    trained_on: str | None = None

    def why_foreign(self, model: ModelSource) -> str | None:
        """A sentence where it says that it was trained on a model of another name; shapes may fit all the same."""
        if self.trained_on == model.identity or not self.backbone:
            return None
        if _last_name(self.backbone) in (_last_name(model.name), _last_name(model.path)):
            return None
        return (
            f"adapter {self.name} says that it was trained on {one_line(self.backbone)}, and is used on "
            f"{model.name}: on another model its values mean nothing"
        )


Source = ModelSource | AdapterSource


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    cache_folder: Path,
    trust_remote_code: bool = False,
    quantization: Kind | None = None,
    progress: Progress = _silent,
) -> ModelSource:
    """Find a model: `smollm2-135m`, a folder, an s3:// or gs:// folder, or a hub id such as org/name.

    Of a model elsewhere only configuration, tokenizer and the weights' headers are fetched. `quantization` says how
    its weights are to be quantised while they are loaded.

    Raises:
        ConfigurationError: there is no such model, or it cannot be used, and why: a package that its configuration
            asks for is missing, for instance.
    """
    location = _locate(name, revision)
    if location is Location.HUB:
        folder, commit, counts = resolve_on_hub(name, revision, with_code=trust_remote_code)
        asked = _asked(folder, name, quantization)
        return ModelSource(
            name, location, str(folder), commit, f"hub:{name}@{commit}", counts, trust_remote_code, *asked
        )
    if location is Location.REMOTE:
        tree = list_remote(name)
        files = find_model_files(tree, with_code=trust_remote_code)
        inventory = take_inventory(tree, files)
        folder = fetch(tree, files.small, tree.cache_folder(cache_folder, files.names), progress=progress)
    else:
        folder = _folder_here(name, location, cache_folder, progress)
        inventory = _inventory_here(folder, adapter=False, with_code=trust_remote_code)
    asked = _asked(folder, name, quantization)
    identity = embedded.IDENTITY if location is Location.EMBEDDED else inventory.identity
    counts = inventory.num_parameters_by_dtype
    return ModelSource(name, location, str(folder), None, identity, counts, trust_remote_code, *asked)


def resolve_configured(model: ModelConfig, cache_folder: Path, *, progress: Progress = _silent) -> ModelSource:
    """Find the model of a section of the configuration, as `resolve_model` does."""
    return resolve_model(
        model.model,
        revision=model.revision,
        cache_folder=cache_folder,
        trust_remote_code=model.trust_remote_code,
        quantization=None if model.quantization is None else model.quantization.kind,
        progress=progress,
    )


def _asked(folder: Path, name: str, kind: Kind | None) -> tuple[tuple[Need, ...], str | None, Kind | None]:
    """What a model asks for, how its weights are quantised, and how they are to be.

    Raises:
        ConfigurationError: a package is not installed here (hosts mostly are alike), or weights that are quantised
            already are to be quantised.
    """
    config = read_json(LocalTree(folder), CONFIG)
    needs = find_needs(config, name)
    found = [method for part in parts_of(config) if (method := stored_method(part, name)) is not None]
    if kind is not None:
        if found:
            raise ConfigurationError(
                f"{name} has weights quantised with {found[0]} already; leave out quantization ({kind}), or name the "
                "model that it was made from"
            )
        needs, found = (*needs, need_of_kind(kind)), [KINDS[kind].method]
    check_needs(needs, name)
    return needs, next(iter(found), None), kind


def resolve_adapter(
    name: str, *, revision: str | None = None, cache_folder: Path, progress: Progress = _silent
) -> AdapterSource:
    """Find a PEFT LoRA adapter: a folder, an s3:// or gs:// folder, or a hub id. It is small and fetched whole.

    Raises:
        ConfigurationError: there is none, or it is of another kind than LoRA, or more.
    """
    location = _locate(name, revision)
    commit = None
    if location is Location.EMBEDDED:
        raise ConfigurationError(f"{name} is a model, not an adapter")
    if location is Location.HUB:
        folder, commit = fetch_hub_adapter(name, revision)
    elif location is Location.REMOTE:
        folder = _fetch_whole(name, cache_folder, progress, adapter=True)
    else:
        folder = _folder_here(name, location, cache_folder, progress)
    inventory = _inventory_here(folder, adapter=True)
    config = read_json(LocalTree(folder), ADAPTER_CONFIG)
    form = read_form(config, name)
    if form is None and config.get("peft_type") != "LORA":
        raise ConfigurationError(
            f"adapter {name} has peft_type {config.get('peft_type')}; only LORA and PBLORA are served"
        )
    rank = config.get("r") if form is None else form.fixed_rank + form.rank * len(form.objectives)
    if type(rank) is not int or rank < 1:
        raise ConfigurationError(f"adapter {name}: r in {ADAPTER_CONFIG} must be a positive number; got {rank!r:.60}")
    more = [key for key in MORE_THAN_LORA if config.get(key)]
    if config.get("bias", "none") != "none":
        more.append(f"bias: {config['bias']}")
    if str(begin := config.get("init_lora_weights")).lower().startswith(CHANGES_THE_MODEL):
        more.append(f"init_lora_weights: {begin}")
    if more:
        raise ConfigurationError(
            f"adapter {name} has {', '.join(more)}, which is not mixed with others in a pass; merge it into its "
            "model (peft's merge_and_unload) and name that as a model"
        )
    return AdapterSource(
        name=name,
        location=location,
        path=str(folder),
        revision=commit,
        identity=f"hub:{name}@{commit}" if commit else inventory.identity,
        num_parameters_by_dtype=inventory.num_parameters_by_dtype,
        rank=rank,
        backbone=str(config.get("base_model_name_or_path") or "") or None,
        form=form,
        trained_on=_trained_on(folder),
    )


def _last_name(name: str) -> str:
    """A model's name without its folder or organisation: copies of a model often lie elsewhere."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _trained_on(folder: Path) -> str | None:
    """The identity of the model that `cage train` states beside an adapter; None of any other adapter."""
    tree = LocalTree(folder)
    if TRAINING_FACTS not in tree.sizes:
        return None
    stated = read_json(tree, TRAINING_FACTS).get("backbone")
    identity = stated.get("identity") if isinstance(stated, dict) else None
    return identity if isinstance(identity, str) else None


def fetch_weights(source: Source, *, cache_folder: Path, progress: Progress = _silent) -> Path:
    """The folder with all of the model on this machine, fetched where it is missing: what `from_pretrained` reads.

    Raises:
        ConfigurationError: it cannot be had here, is not the content that was resolved, or needs a package that this
            process does not have.
    """
    if isinstance(source, ModelSource):
        check_needs(source.needs, source.name, machine=platform.node())
    is_adapter = isinstance(source, AdapterSource)
    with_code = isinstance(source, ModelSource) and source.trust_remote_code
    if source.location is Location.HUB:  # a commit cannot change
        if is_adapter:
            return fetch_hub_adapter(source.name, source.revision)[0]
        return fetch_hub_model(source.name, source.revision, with_code=with_code)
    if source.location is Location.REMOTE:
        folder = _fetch_whole(source.name, cache_folder, progress, adapter=is_adapter, with_code=with_code)
    else:
        folder = _folder_here(source.name, source.location, cache_folder, progress)
    if source.location is not Location.EMBEDDED:
        identity = _inventory_here(folder, adapter=is_adapter, with_code=with_code).identity
        if identity != source.identity:
            raise ConfigurationError(
                f"{source.name} on machine {platform.node()} is not what was planned with ({identity} instead of "
                f"{source.identity}): it changed meanwhile, or the machines hold different copies"
            )
    return folder


def _locate(name: str, revision: str | None) -> Location:
    """Where a name points, by its form; a folder that exists comes before a hub id."""
    scheme, separator, _ = name.partition("://")
    if name == EMBEDDED_MODEL:
        location = Location.EMBEDDED
    elif separator and scheme != "file":
        location = Location.REMOTE
    elif separator or Path(name).expanduser().is_dir() or not HUB_ID.fullmatch(name):
        location = Location.FOLDER
    elif difflib.get_close_matches(name.lower(), [EMBEDDED_MODEL], cutoff=0.8):
        raise ConfigurationError(f"no model {name}; the embedded one is called {EMBEDDED_MODEL}")
    else:
        location = Location.HUB
    if revision is not None and location is not Location.HUB:
        raise ConfigurationError(f"revision {revision}: {name} is not a hub id, only those have revisions")
    return location


def _folder_here(name: str, location: Location, cache_folder: Path, progress: Progress) -> Path:
    if location is Location.EMBEDDED:
        return embedded.prepare_embedded(cache_folder, progress=progress)
    folder = Path(name.removeprefix("file://")).expanduser().absolute()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigurationError(f"{name} is a file; a model is a folder with config.json and safetensors")
    siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f"; did you mean {folder.parent / close[0]}?" if close else ""
    raise ConfigurationError(
        f"no model folder {folder} on machine {platform.node()}{hint} (a folder must be on every machine of the run; "
        f"s3:// addresses and hub ids are fetched by each)"
    )


def _fetch_whole(
    name: str, cache_folder: Path, progress: Progress, *, adapter: bool, with_code: bool = False
) -> Path:
    tree = list_remote(name)
    files = _find_files(tree, adapter=adapter, with_code=with_code)
    return fetch(tree, files.names, tree.cache_folder(cache_folder, files.names), progress=progress)


def _inventory_here(folder: Path, *, adapter: bool, with_code: bool = False) -> Inventory:
    tree = LocalTree(folder)
    return take_inventory(tree, _find_files(tree, adapter=adapter, with_code=with_code))


def _find_files(tree: FileTree, *, adapter: bool, with_code: bool) -> ModelFiles:
    return find_adapter_files(tree) if adapter else find_model_files(tree, with_code=with_code)
