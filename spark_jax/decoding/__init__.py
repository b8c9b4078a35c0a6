"""Sampling, the jitted batched decoder, and slot scheduling."""

from spark_jax.decoding.generate import compiled_programs as compiled_programs
from spark_jax.decoding.generate import generate as generate
from spark_jax.decoding.generate import layout as layout
from spark_jax.decoding.generate import no_samples as no_samples
from spark_jax.decoding.generate import rollout_of as rollout_of
from spark_jax.decoding.generate import samples_of as samples_of
from spark_jax.decoding.rollout import Rollout as Rollout
from spark_jax.decoding.sampling import Sampling as Sampling
