"""Compat: `minicn.measures` is `minicn.toy.measures`."""

import sys

from minicn.toy import measures

sys.modules[__name__] = measures
