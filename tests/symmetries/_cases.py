"""All architectures that are labelled by hand."""

from tests.symmetries import _cases_convolution as _cases_convolution
from tests.symmetries import _cases_layerwise as _cases_layerwise
from tests.symmetries import _cases_sequence as _cases_sequence
from tests.symmetries import _cases_special as _cases_special
from tests.symmetries._case import CASES as CASES
