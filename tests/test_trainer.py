"""Training: features are what the backbone computes, and an interrupted run ends with the weights of a straight one.

The trainer knows no method, so that most of this is tested with modules of ten lines whose optimum, or whose ranks,
are known.
"""

import errno
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from command_line import Foretell, runner, save_tiny_chat
from hypothesis import given
from hypothesis import strategies as st
from random_backbones import BF16, FP32, KERNELS, Model, examples, run, same, using
from tiny_models import DIMENSIONS, raising
from torch import Tensor, nn

from foretell.backbone import Backbone, Nodes
from foretell.contracts import FINAL
from foretell.drafters import checkpoint
from foretell.drafters.parts import Trainable, TrainingBatch
from foretell.errors import ForetellError, UsageError
from foretell.train import features as featuring
from foretell.train import trainer as training
from foretell.train.data import Distilled, Store
from foretell.train.features import TEACHER, Features
from foretell.train.trainer import POOL, Settings, Trainer
from foretell.trees import chain
