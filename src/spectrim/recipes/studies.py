"""The studies that come with Spectrim, as values. Their settings were chosen on held-out training images."""

from spectrim.errors import DataError
from spectrim.plan import Metric
from spectrim.recipes.dynamic_study import DynamicStudy, Moving, Truncating
from spectrim.recipes.mlp_study import MlpStudy, Tuning
from spectrim.recipes.projected_study import ProjectedStudy
from spectrim.recipes.study import Phase, Study
from spectrim.report import Published
from spectrim.surgery import near

_DENSE = Phase(epochs=8, lr=1e-3, batch=128)
_METRICS: tuple[Metric, ...] = ("plain", "activation")

MNIST_MLP = MlpStudy(
    name="mnist-mlp",
    title="784-1024x5-10 on MNIST: every layer but the last at rank 200 to 10",
    dataset="mnist",
    ranks=(200, 100, 50, 20, 10),
    held_out=2000,
    calibration_images=10_000,
    dense=_DENSE,
    tunings=tuple(
        Tuning(metric=metric, phase=Phase(epochs=5, lr=3e-3, batch=128), temperature=2.0) for metric in _METRICS
    ),
    published=(
        Published(
            source="the classic study of this network",
            accuracy=((None, 0.970), (200, 0.968), (100, 0.955), (50, 0.941), (20, 0.911), (10, 0.875)),
        ),
    ),
    command="spectrim recipe mnist-mlp",
)

MNIST_FACTORS = MlpStudy(
    name="mnist-factors",
    title="784-1024x5-10 on MNIST: the factors of rank 20 fine-tuned",
    dataset="mnist",
    ranks=(20,),
    held_out=2000,
    calibration_images=10_000,
    dense=_DENSE,
    tunings=(
        Tuning(metric="plain", phase=Phase(epochs=5, lr=3e-3, batch=128)),
        Tuning(metric="activation", phase=Phase(epochs=5, lr=3e-3, batch=128), temperature=2.0),
    ),
    command="spectrim recipe mnist-factors",
)

MNIST_DYNAMIC = DynamicStudy(
    name="mnist-dynamic",
    title="784-1024x5-10 on MNIST: truncated to rank 20 in every forward pass of the training",
    dataset="mnist",
    rank=20,
    held_out=2000,
    dense=_DENSE,
    ways=(
        Truncating(name="as published", phase=Phase(epochs=5, lr=3e-4, batch=256), shrink=0.0, keep="best"),
        Truncating(
            name="stabilised", phase=Phase(epochs=5, lr=1e-3, batch=256), shrink=0.1, keep="last", temperature=2.0
        ),
        Moving(  # trained as the one before, for no more parameters
            name="ranks chosen in training",
            phase=Phase(epochs=5, lr=1e-3, batch=256),
            shrink=0.1,
            keep="last",
            temperature=2.0,
            start=0.1,
            every=25,
            settled=0.5,
        ),
        Truncating(  # what the shrinking alone does
            name="not shrunk", phase=Phase(epochs=5, lr=1e-3, batch=256), shrink=0.0, keep="last", temperature=2.0
        ),
    ),
    command="spectrim recipe mnist-dynamic",
)

MNIST_PROJECTED = ProjectedStudy(
    name="mnist-projected",
    title="784-1024x5-10 on MNIST: trained from scratch, projected to rank 20 at every epoch",
    dataset="mnist",
    rank=20,
    held_out=2000,
    dense=_DENSE,
    projected=Phase(epochs=10, lr=1e-3, batch=256),
    command="spectrim recipe mnist-projected",
)

DEMO = MlpStudy(
    name="demo",
    title="64-1024x5-10 on handwritten digits: every layer but the last at rank 50 to 5",
    dataset="digits",
    ranks=(50, 20, 10, 5),
    held_out=237,
    calibration_images=1200,
    dense=Phase(epochs=12, lr=1e-3, batch=64),
    tunings=tuple(
        Tuning(metric=metric, phase=Phase(epochs=12, lr=1e-3, batch=64), temperature=4.0) for metric in _METRICS
    ),
    command="spectrim demo",
)

STUDIES: tuple[Study, ...] = (DEMO, MNIST_MLP, MNIST_FACTORS, MNIST_DYNAMIC, MNIST_PROJECTED)


def find_study(name: str) -> Study:
    """The study of this name.

    Raises:
        DataError: there is none; lists near names.
    """
    for study in STUDIES:
        if study.name == name:
            return study
    raise DataError(f"there is no recipe {name!r}{near(name, [study.name for study in STUDIES])}")
