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
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention AlphaDropout Attention
    AutoContrast Average AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional
    CategoryEncoding CenterCrop Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose
    ConvLSTM1D ConvLSTM2D ConvLSTM3D Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D
    Discretization Dot Dropout ELU EinsumDense Embedding Flatten GRU GRUCell GaussianDropout GaussianNoise
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D
    GlobalMaxPooling3D GroupNormalization GroupQueryAttention Identity InputLayer LSTM LSTMCell LayerNormalization
    LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum MultiHeadAttention Multiply Normalization
    PReLU Permute RMSNormalization RNN RandomBrightness RandomColorJitter RandomContrast RandomErasing RandomFlip
    RandomGrayscale RandomHue RandomRotation RandomSaturation RandomTranslation RandomZoom ReLU RepeatVector Rescaling
    Reshape Resizing ReversibleEmbedding SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell Softmax
    SpatialDropout1D SpatialDropout2D SpatialDropout3D SpectralNormalization StackedRNNCells Subtract TimeDistributed
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
    """.split()
)
_OTHERS = {
    "keras": frozenset({"Sequential", "Functional"}),
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
DTYPES = frozenset("bfloat16 bool float16 float32 float64 int8 int16 int32 int64 mixed_bfloat16 uint8 uint16 uint32".split())
"""Of weights, of what flows between layers, and the policies that say how to compute."""
_TENSOR = "__keras_tensor__"
"""How a functional model's JSON names what flows between its layers: a shape, a dtype and where it comes from."""
_MARKED = {"__lambda__", "__tensor__", "__numpy__", "__ellipsis__", "__typespec__"}
_LEFT_OUT = ("build_config", "compile_config")
"""What Keras would act on and Atoll has no use for: shapes to build with (the input says them), and how it was compiled."""
_FILES = ("vocabulary", "weights", "filepath", "path", "file")
_LEARNT = {"Normalization": ("mean", "variance"), "Discretization": ("bin_boundaries",)}
"""What `adapt` finds isn't in the JSON: it has to be given."""
_MOST_ITERATIONS = 100


def check(model: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a model's JSON unless everything in it is on the list; return what of it is for Keras.

    Args:
        model: what `model.to_json()` writes, parsed.

    Raises:
        PlanError: naming the first thing that isn't allowed, and its place.
    """
    if model.get("class_name") not in ("Sequential", "Functional"):
        raise PlanError(f"model.keras: a '{model.get('class_name')}' can't be sent; write a Sequential or a functional model")
    try:
        kept: dict[str, Any] = _kept(model)
        _walk(kept, "model.keras")
    except RecursionError:
        raise PlanError("model.keras: it is nested too deep to be read") from None
    return kept


def options(values: Mapping[str, Any], place: str) -> None:
    """Refuse options of a loss or an optimiser that are more than plain numbers and switches: Keras would build what they name.

    Raises:
        PlanError: naming the option.
    """
    for name, value in values.items():
        if not isinstance(value, (bool, int, float, type(None))):
            raise PlanError(f"{place}.{name}: is {type(value).__name__}; these options are numbers, true or false")


def _kept(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _kept(held) for name, held in value.items() if name not in _LEFT_OUT}
    return [_kept(held) for held in value] if isinstance(value, list) else value


def _walk(value: Any, place: str, key: str = "") -> None:
    if isinstance(value, Mapping):
        if marks := _MARKED & value.keys():
            raise PlanError(f"{place}: '{min(marks)}' carries code or raw data, which a plan can't")
        if value.get("class_name") == _TENSOR:
            _tensor(value, place)
        elif value.get("class_name") == "DTypePolicy":
            _policy(value, place)
        else:
            place = _named(value, place) if "class_name" in value else place
            for inner, held in value.items():
                _walk(held, f"{place}.{inner}", inner)
    elif isinstance(value, list):
        for number, held in enumerate(value):
            _walk(held, f"{place}[{number}]", key)
    elif isinstance(value, str):
        _word(value, key, place)
    elif key == "unroll" and value is True:
        raise PlanError(f"{place}: unroll = true makes a long series compile for ever; leave it out")
    elif key == "power_iterations" and isinstance(value, int) and value > _MOST_ITERATIONS:
        raise PlanError(f"{place}: more than {_MOST_ITERATIONS} iterations in each step")


def _policy(value: Mapping[str, Any], place: str) -> None:
    config = value.get("config")
    if value.get("module") != "keras" or value.get("registered_name") or not isinstance(config, Mapping):
        raise PlanError(f"{place}: a dtype policy other than Keras' own can't be sent")
    if config.keys() - {"name", "source_name"} or not isinstance(config.get("name"), str):
        raise PlanError(f"{place}: a dtype policy holds a name and nothing else")
    _word(config["name"], "dtype", place)


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
            f"{said}: '{module}.{name}' is not on the list of layers and parts that a plan may hold; see docs/how-to/keras.md"
        )
    if registered not in (None, "Functional", "Sequential"):
        raise PlanError(f"{said}: custom objects ('{registered}') can't be sent; use built-in layers")
    config = value.get("config")
    for key in _LEARNT.get(name, ()):
        if not isinstance(config, Mapping) or config.get(key) is None:
            raise PlanError(f"{said}: say its {key}: what adapt() finds isn't in the JSON")
    return said


def _word(value: str, key: str, place: str) -> None:
    if key.endswith("activation") and value not in ACTIVATIONS:
        raise PlanError(f"{place}: activation '{value}' is not on the list; see docs/how-to/keras.md")
    if key == "dtype" and value not in DTYPES:
        mend = "mixed_bfloat16 needs no loss scaling" if value == "mixed_float16" else f"it is one of {', '.join(sorted(DTYPES))}"
        raise PlanError(f"{place}: dtype '{value[:80]}' can't be sent; {mend}")
    if key in _FILES or "://" in value:
        raise PlanError(f"{place}: loads a file ('{value[:80]}'), which a plan can't: a node reads no files for a server")
