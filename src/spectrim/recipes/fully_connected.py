"""What the studies of the fully connected network share."""

from abc import ABC
from collections.abc import Iterable, Mapping

from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.spectra import analyze
from spectrim.core.plans import Rank
from spectrim.models import mlp
from spectrim.planning.rules import require_possible
from spectrim.recipes.images import Images
from spectrim.recipes.study import Study


class FullyConnected(Study, ABC):
    """A study of the fully connected network.

    Attributes:
        width: Size of the hidden layers.
        hidden: How many there are.
    """

    width: int = Field(default=1024, ge=1)
    hidden: int = Field(default=5, ge=1)

    def network(self, images: Images) -> nn.Module:
        """Flatten, `hidden` layers of `width` with ReLU, and a head."""
        return mlp(images.train.images[0].numel(), images.classes, width=self.width, hidden=self.hidden)

    def require_ranks(self, model: nn.Module, example: Tensor, ranks: Iterable[int]) -> None:
        """Raise `RuleError` for a rank that a layer but the last cannot have; arguments as for `require_possible`."""
        analysis = analyze(model, example, keep_last=True)
        for rank in ranks:
            require_possible(analysis, Rank(rank), metric="plain")

    def network_settings(self) -> Mapping[str, object]:
        """Its sizes."""
        return {"kind": "mlp", "width": self.width, "hidden": self.hidden}
