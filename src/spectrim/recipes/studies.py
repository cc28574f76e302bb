"""The studies that come with Spectrim, as values."""

from spectrim.errors import DataError
from spectrim.recipes.mlp_study import MlpStudy, Phase
from spectrim.report import Published
from spectrim.surgery import near

MNIST_MLP = MlpStudy(
    name="mnist-mlp",
    title="784-1024x5-10 on MNIST: every layer but the last at rank 200 to 10",
    dataset="mnist",
    ranks=(200, 100, 50, 20, 10),
    held_out=2000,
    calibration_images=10_000,
    dense=Phase(epochs=8, lr=1e-3, batch=128),
    tuning=Phase(epochs=5, lr=3e-3, batch=128),
    temperature=2.0,
    published=(
        Published(
            source="the classic study of this network",
            accuracy=((None, 0.970), (200, 0.968), (100, 0.955), (50, 0.941), (20, 0.911), (10, 0.875)),
        ),
    ),
    command="spectrim recipe mnist-mlp",
)

DEMO = MlpStudy(
    name="demo",
    title="64-1024x5-10 on handwritten digits: every layer but the last at rank 50 to 5",
    dataset="digits",
    ranks=(50, 20, 10, 5),
    held_out=237,
    calibration_images=1200,
    dense=Phase(epochs=12, lr=1e-3, batch=64),
    tuning=Phase(epochs=12, lr=1e-3, batch=64),
    command="spectrim demo",
)

STUDIES = (DEMO, MNIST_MLP)


def find_study(name: str) -> MlpStudy:
    """The study of this name.

    Raises:
        DataError: there is none; lists near names.
    """
    for study in STUDIES:
        if study.name == name:
            return study
    raise DataError(f"there is no recipe {name!r}{near(name, [study.name for study in STUDIES])}")
