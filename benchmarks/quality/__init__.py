"""Does the new preference come without the loss of what the model knew? Measured, per method.

    python -m benchmarks.quality --set quick                 # the pairs that the project ships
    python -m benchmarks.quality --set full --data train.jsonl --heldout test.jsonl
    python -m benchmarks.quality --vary reg_coef=0,0.05,0.2 --vary learning_rate=3e-4,1e-3

settings -> data -> train -> (score, answers, tasks, judge) -> study -> summary -> report, figures.
Every method trains the same LoRA from the same start on the same pairs in the same order; what
comes out is the weights of a LoRA, and everything is measured on those in the same way.
"""
