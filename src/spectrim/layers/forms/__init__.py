"""Forms: how a unit is approximated. A new one is a file here and an entry in `FORMS`."""

from collections.abc import Sequence

from spectrim.core.errors import PlanError
from spectrim.layers.forms.base import Form, JointForm, RankCosts, SingleWeightForm
from spectrim.layers.forms.channel import ChannelForm, LowRankConv, LowRankConv1d, LowRankConv2d, LowRankConvTranspose2d
from spectrim.layers.forms.head_qk import HeadQueryKeyForm
from spectrim.layers.forms.head_vo import HeadValueOutputForm
from spectrim.layers.forms.interpolative import InterpolativeForm, InterpolativeLayer
from spectrim.layers.forms.linear import LinearForm, LowRankEmbedding, LowRankEmbeddingBag, LowRankLinear
from spectrim.layers.forms.spatial import SpatialConv2d, SpatialForm
from spectrim.layers.forms.tucker2 import Tucker2Conv2d, Tucker2Form
from spectrim.layers.forms.width import WidthForm
from spectrim.layers.units import Unit

__all__ = [
    "FORMS",
    "JOINT_FORMS",
    "Form",
    "InterpolativeLayer",
    "JointForm",
    "LowRankConv",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConvTranspose2d",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankLinear",
    "RankCosts",
    "SingleWeightForm",
    "SpatialConv2d",
    "Tucker2Conv2d",
    "allowed_forms",
    "find_form",
    "form_named",
    "forms_of",
    "joint_form_named",
    "joint_forms_of",
    "selected_forms",
]

FORMS: tuple[SingleWeightForm, ...] = (LinearForm(), ChannelForm(), SpatialForm(), Tucker2Form(), InterpolativeForm())
JOINT_FORMS: tuple[JointForm, ...] = (WidthForm(), HeadValueOutputForm(), HeadQueryKeyForm())


def forms_of(unit: Unit) -> tuple[SingleWeightForm, ...]:
    """The forms that a unit can take by itself, the one with a closed solution first."""
    return tuple(sorted((form for form in FORMS if form.fits(unit)), key=lambda form: not form.closed_form))


def joint_forms_of(unit: Unit) -> tuple[JointForm, ...]:
    """The forms that a unit can take together with the layers that feed it."""
    return tuple(form for form in JOINT_FORMS if form.fits(unit))


def find_form(name: str) -> Form:
    """The form of this name.

    Raises:
        PlanError: there is none.
    """
    forms: tuple[Form, ...] = (*FORMS, *JOINT_FORMS)
    for form in forms:
        if form.name == name:
            return form
    raise PlanError(f"there is no form {name!r}; there are {', '.join(form.name for form in forms)}")


def form_named(name: str) -> SingleWeightForm:
    """The form of a weight by itself of this name; raises `PlanError` where there is none."""
    form = find_form(name)
    if not isinstance(form, SingleWeightForm):
        raise PlanError(f"the {name} form is one of several layers together")
    return form


def joint_form_named(name: str) -> JointForm:
    """The form of several layers together of this name; raises `PlanError` where there is none."""
    form = find_form(name)
    if not isinstance(form, JointForm):
        raise PlanError(f"the {name} form is one of a weight by itself")
    return form


def allowed_forms(own: Sequence[str], names: Sequence[str]) -> list[str]:
    """Of a layer's own forms those named, in their order; a layer that has but one that saves time is not asked."""
    named = [form for form in dict.fromkeys(names) if form in own]
    usual = [form for form in own if find_form(form).saves_time]
    return named or (usual if len(usual) == 1 else [])


def selected_forms(
    names: Sequence[str] | str | None, *, closed_form: bool = False, for_size: bool = True
) -> tuple[str, ...]:
    """Names of the forms that may be used: those given, or all of them, or all that have a closed solution.

    Without `for_size` all that save time.

    Raises:
        PlanError: an unknown name, or none at all.
    """
    if names is None:
        suited = (form for form in (*FORMS, *JOINT_FORMS) if form.saves_time or for_size)
        return tuple(form.name for form in suited if form.closed_form or not closed_form)
    selected = (names,) if isinstance(names, str) else tuple(names)
    known = [form.name for form in (*FORMS, *JOINT_FORMS)]
    if not selected or any(name not in known for name in selected):
        raise PlanError(f"forms={names!r}: give some of {', '.join(known)}")
    return selected
