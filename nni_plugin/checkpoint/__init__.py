"""Save a network with its plan to a folder and load it again bit by bit: JSON and safetensors, no pickle.

`config.json` says how to build the dense network and what to cut, `model.safetensors` holds the tensors. A folder
may come from anybody: everything in it is checked before it is used, and nothing in it can name another file.
"""

from nni_plugin.checkpoint.load import from_pretrained, input_shape_of
from nni_plugin.checkpoint.save import save_pretrained

__all__ = ["from_pretrained", "input_shape_of", "save_pretrained"]
