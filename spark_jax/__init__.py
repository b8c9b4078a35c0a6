"""Process rewards for training reasoning models, in JAX.

SPARK (arXiv 2512.03244) makes process reward models from a model's own step-by-step verifications
and trains a policy with them; SPRO (arXiv 2507.01551) takes process rewards from the policy's own
log-probabilities. Everything is a pure function of arrays or of plain records; import the module
that holds the idea you need (`spark_jax.advantages`, `spark_jax.decoding`, ...). Importing this
package alone loads nothing else and starts no backend.
"""
