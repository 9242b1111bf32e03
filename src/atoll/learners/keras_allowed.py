"""Which Keras models may be built from JSON: checked on the JSON itself, before Keras sees a word of it.

A list of what is allowed, not of what is dangerous: whatever is not named here is refused. Nothing on the
list runs code from the JSON, reads a file or opens a connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.errors import PlanError

LAYERS = frozenset(
    """
    Activation ActivityRegularization Add AdditiveAttention AlphaDropout Attention Average AveragePooling1D
    AveragePooling2D AveragePooling3D BatchNormalization Bidirectional CategoryEncoding Concatenate Conv1D
    Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose Cropping1D Cropping2D Cropping3D Dense
    DepthwiseConv1D DepthwiseConv2D Dot Dropout ELU EinsumDense Embedding Flatten GRU GRUCell GaussianDropout
    GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization GroupQueryAttention Identity InputLayer LSTM
    LSTMCell LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum
    MultiHeadAttention Multiply PReLU Permute RMSNormalization RNN ReLU RepeatVector Rescaling Reshape
    SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell Softmax SpatialDropout1D SpatialDropout2D
    SpatialDropout3D SpectralNormalization StackedRNNCells Subtract TimeDistributed UnitNormalization
    UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """.split()
)
_OTHERS = {
    "keras": frozenset({"Sequential", "Functional", "DTypePolicy"}),
    "keras.src.models.functional": frozenset({"Functional"}),
    "keras.initializers": frozenset(
        """
        Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform Ones Orthogonal
        RandomNormal RandomUniform TruncatedNormal VarianceScaling Zeros
        """.split()
    ),
    "keras.regularizers": frozenset({"L1", "L2", "L1L2", "OrthogonalRegularizer"}),
    "keras.constraints": frozenset({"MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm"}),
}
ACTIVATIONS = frozenset(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid
    log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus sparsemax
    squareplus swish tanh tanh_shrink threshold
    """.split()
)
_TENSOR = "__keras_tensor__"
"""How a functional model's JSON names what flows between its layers: a shape, a dtype and where it comes from."""
_MARKED = {"__lambda__", "__tensor__", "__numpy__", "__ellipsis__", "__typespec__"}


def check(model: Mapping[str, Any]) -> None:
    """Refuse a model's JSON unless everything in it is on the list.

    Args:
        model: what `model.to_json()` writes, parsed.

    Raises:
        PlanError: naming the first thing that isn't allowed, and its place.
    """
    if model.get("class_name") not in ("Sequential", "Functional"):
        raise PlanError(f"model.keras: a '{model.get('class_name')}' can't be sent; write a Sequential or a functional model")
    _walk(model, "model.keras")


def _walk(value: Any, place: str, key: str = "") -> None:
    if isinstance(value, Mapping):
        if marks := _MARKED & value.keys():
            raise PlanError(f"{place}: '{min(marks)}' carries code or raw data, which a plan can't")
        if value.get("class_name") == _TENSOR:
            _tensor(value, place)
            return
        if "class_name" in value and not (key == "dtype" and value.get("class_name") == "DTypePolicy"):
            place = _named(value, place)
        for inner, held in value.items():
            _walk(held, f"{place}.{inner}", inner)
    elif isinstance(value, list):
        for number, held in enumerate(value):
            _walk(held, f"{place}[{number}]", key)
    elif isinstance(value, str):
        _word(value, key, place)


def _tensor(value: Mapping[str, Any], place: str) -> None:
    config = value.get("config")
    if (
        value.keys() != {"class_name", "config"}
        or not isinstance(config, Mapping)
        or config.keys() - {"shape", "dtype", "keras_history"}
    ):
        raise PlanError(f"{place}: '{_TENSOR}' holds more than a shape, a dtype and a history")


def _named(value: Mapping[str, Any], place: str) -> str:
    """Check a thing that names its class; return a place that people recognise."""
    name, module, registered = str(value["class_name"]), value.get("module"), value.get("registered_name")
    said = f"{place} ({name})"
    if "function" in (name, registered) or module == "builtins":
        raise PlanError(f"{said}: functions can't be sent; use a built-in layer or activation")
    allowed = LAYERS if module == "keras.layers" else _OTHERS.get(str(module), frozenset())
    if name not in allowed:
        raise PlanError(
            f"{said}: '{module}.{name}' is not on the list of layers and parts that a plan may hold; "
            "see atoll.learners.keras_allowed"
        )
    if registered not in (None, "Functional", "Sequential"):
        raise PlanError(f"{said}: custom objects ('{registered}') can't be sent; use built-in layers")
    return said


def _word(value: str, key: str, place: str) -> None:
    if key.endswith("activation") and value not in ACTIVATIONS:
        raise PlanError(f"{place}: activation '{value}' is not on the list; see atoll.learners.keras_allowed")
    if key in ("vocabulary", "weights", "filepath", "path", "file") or "://" in value:
        raise PlanError(f"{place}: loads a file ('{value[:80]}'), which a plan can't: a node reads no files for a server")
