"""What a unit is: one thing that is approximated as a whole."""

from dataclasses import dataclass
from typing import ClassVar

from spectrim.core.plans import Cost
from spectrim.layers.types import Geometry, LayerType, Positions


@dataclass(frozen=True)
class Weight:
    """One weight and every place that uses it, as a value: the layers themselves are found by their names.

    Attributes:
        name: The first name of the layer that is called first.
        tied_names: Its other names, and the names of other layers that share the weight.
        call_sites: The first name of each distinct layer that uses the weight, `name` first.
        kind: The layer's class.
        shape: Shape of the weight as it is stored.
        layer_type: How the layer holds a matrix; None for one of no known type.
        geometry: Sizes of that matrix; None where there is none, or none that can be computed with.
        positions: Vectors handled in the traced pass, all uses together; none where no pass was traced.
        biases: How many the call sites have together that no unit before counts; one that they share counts once.
        params: Numbers that the layer stores.
        itemsize: Bytes of one of them.
        outputs: Call sites that multiply by the transpose: the output layers that share the weight of an embedding.
        stack: Of an expert of a mixture the name that the same projection of all experts has together.
        is_nested: Whether it multiplies nested tensors.
    """

    name: str
    tied_names: tuple[str, ...]
    call_sites: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    layer_type: LayerType | None
    geometry: Geometry | None
    positions: Positions
    biases: int
    params: int
    itemsize: int
    outputs: tuple[str, ...] = ()
    stack: str | None = None
    is_nested: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """`name` and `tied_names`."""
        return self.name, *self.tied_names

    @property
    def is_lookup(self) -> bool:
        """See `LayerType`."""
        return self.layer_type is not None and self.layer_type.is_lookup

    @property
    def dense_cost(self) -> Cost:
        """Its cost as it is, biases included."""
        if self.geometry is None:
            return Cost(params=self.params, macs=0)
        return self.geometry.dense_cost(self.positions) + Cost(params=self.biases * self.geometry.outputs, macs=0)


@dataclass(frozen=True)
class Unit:
    """One thing that is approximated as a whole: weights around one inner space that can be made smaller.

    A single weight is a unit: its inner space is the one that its factors share. Several weights are one unit where a
    space lies between them that nothing else reads, so that it can be narrowed and the weights with it:

    - the neurons of an MLP: its weights are up, [gate,] and down; rows of the first ones and columns of the last one
      belong together;
    - a head's value and output, or its query and key: the inner space is the head's dimension;
    - the weights that read one input (query, key and value; gate and up): they share the factor that reads it.

    A kind of unit is a subclass in a file of its own, which says what its weights are to each other (`Mlp.up`, ..),
    with a function that finds all units of the kind in a traced model, and a line in `UNIT_FINDERS`. Units are found by
    what the model does, never by its class alone. What can be done with a unit is up to the forms: `Form.fits` knows
    the kind. All else goes by the attributes here. A weight may belong to several units; a plan takes units that share
    none.

    Attributes:
        kind: What it is called in tables.
        weights: Its weights in the order of execution.
        skip_reason: Why it must stay as it is, or None.
    """

    kind: ClassVar[str]
    weights: tuple[Weight, ...]
    skip_reason: str | None

    @property
    def name(self) -> str:
        """What it is called in plans: the name of its first weight."""
        return self.weights[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers that use its weights."""
        return tuple(name for weight in self.weights for name in weight.names)

    @property
    def call_sites(self) -> tuple[str, ...]:
        """The first name of each distinct layer that uses its weights."""
        return tuple(site for weight in self.weights for site in weight.call_sites)

    @property
    def dense_cost(self) -> Cost:
        """Its cost as it is, biases included."""
        return sum((weight.dense_cost for weight in self.weights), Cost(params=0, macs=0))
