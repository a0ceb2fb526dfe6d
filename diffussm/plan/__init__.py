"""What a whole training will take, from raw archive to table row: facts of others, and arithmetic on them."""
