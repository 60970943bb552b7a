"""Tests of one gateway process or store, with a fake engine in place of vLLM."""
