"""The table of kinds of principals. A new kind is a file beside this one and a line here.

The file holds a section derived from `PrincipalSection`: its keys in a configuration, the roles that it needs and how
their outputs become its token reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, get_args

from pydantic import Field

from pipeline.principals.arm import ArmPrincipal
from pipeline.principals.formula import FormulaPrincipal
from pipeline.principals.judge import JudgePrincipal
from pipeline.principals.preference_arm import PreferenceArmPrincipal
from pipeline.principals.prompted import PromptedPrincipal
from pipeline.principals.reward_model import RewardModelPrincipal
from pipeline.principals.section import PrincipalSection
from pipeline.principals.tuned_pair import TunedPairPrincipal
from pipeline.principals.value import ValuePrincipal

Principal = Annotated[
    PromptedPrincipal
    | ArmPrincipal
    | PreferenceArmPrincipal
    | TunedPairPrincipal
    | RewardModelPrincipal
    | FormulaPrincipal
    | ValuePrincipal
    | JudgePrincipal,
    Field(discriminator="kind"),
]

KINDS: Mapping[str, type[PrincipalSection]] = MappingProxyType(
    {get_args(section.model_fields["kind"].annotation)[0]: section for section in get_args(get_args(Principal)[0])}
)
