"""Long pipelines over models of their own, which a test may change."""

import pytest
from own_pipelines import built, own

from finelip_diffusion import FineLIPStableDiffusionPipeline, FineLIPStableDiffusionXLPipeline


@pytest.fixture(scope="module")
def _pipe(_stock):
    return built(FineLIPStableDiffusionPipeline, {**_stock.components, "long_prompt": "stretch"})


@pytest.fixture(scope="module")
def _pipe_xl(_stock_xl):
    stretched = {"long_prompt": "stretch", "second_encoder": "stretch"}
    return built(FineLIPStableDiffusionXLPipeline, {**_stock_xl.components, **stretched})


@pytest.fixture
def stock(_stock):
    return own(_stock)


@pytest.fixture
def pipe(_pipe):
    """The base's own encoder, stretched: for 21 positions it reads as the base does."""
    return own(_pipe)


@pytest.fixture
def stock_xl(_stock_xl):
    return own(_stock_xl)


@pytest.fixture
def pipe_xl(_pipe_xl):
    return own(_pipe_xl)


@pytest.fixture(autouse=True)
def quiet():
    """transformers prints a table of the weights that an adapter does not have, which are all but its own."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)
