"""Every kind of study by the name that recipe files give it."""

from collections.abc import Mapping
from types import MappingProxyType

from spectrim.recipes.classifier_study import ClassifierStudy
from spectrim.recipes.dynamic_study import DynamicStudy
from spectrim.recipes.mini_resnet_study import MiniResNetStudy
from spectrim.recipes.mlp_study import MlpStudy
from spectrim.recipes.projected_study import ProjectedStudy
from spectrim.recipes.study import Study

_ALL: tuple[type[Study], ...] = (MlpStudy, DynamicStudy, ProjectedStudy, MiniResNetStudy, ClassifierStudy)

KINDS: Mapping[str, type[Study]] = MappingProxyType({str(one.model_fields["kind"].default): one for one in _ALL})
"""The class of each kind."""
