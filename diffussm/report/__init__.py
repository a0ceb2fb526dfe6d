"""What a person looks at: sample grids."""
