"""What a run tells while it trains, and what it leaves behind."""
