"""What everything else stands on: errors, patterns, value grids, solutions and result records. numpy only."""
