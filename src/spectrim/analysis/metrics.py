"""Which of the metrics of an analysis is used."""

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.errors import PlanError
from spectrim.core.names import Metric


def metric_of(analysis: Analysis, metric: Metric | None, *, best: bool) -> Metric:
    """The metric asked for, or the usual one: the best that there is, or activation before plain."""
    usual: Metric = "activation" if "activation" in analysis.metrics else "plain"
    chosen = metric or (analysis.metrics[-1] if best else usual)
    if chosen not in analysis.metrics:
        how = "with gradients=True " if chosen == "loss" else ""
        raise PlanError(
            f"the analysis has no {chosen} metric, only {', '.join(analysis.metrics)}; "
            f"pass calibration=st.calibrate(model, batches) {how}to st.analyze"
        )
    return chosen


def measured_in(layer: LayerAnalysis, metric: Metric) -> Metric | None:
    """The metric; activation where no gradient reaches the layer; None for a layer that cannot be factored.

    Convolutions are measured in activation as well: their budgets become better (ResNet-20 at half of its MACs: KL
    to the dense network .046 in place of .050).
    """
    is_convolution = layer.geometry is not None and bool(layer.geometry.kernel)
    usable: list[Metric] = ["activation", metric] if is_convolution else [metric, "activation"]
    return next((own for own in (usable if metric == "loss" else [metric]) if own in layer.problems), None)
