"""Train the packaged sentiment classifier: python training/sentiment.py (about ten minutes on one core, one seed).

MiniLM with a class head learns whether people scored a sentence of a film review above or below 0. Its blocks get
low-rank updates; pooler and class head are trained whole. Only what was learned is written, into
lig_lens/models/sentiment; `load_model("sentiment")` adds it to the packaged MiniLM.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

from lig_lens.inputs.movie_sentences import movie_sentences
from lig_lens.models.packaged import PACKAGED, quiet_transformers
