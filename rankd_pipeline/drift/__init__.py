"""Has the field moved away from what the model knows, by how much, and why: statistics, judgement, named causes."""
