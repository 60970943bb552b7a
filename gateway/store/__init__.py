"""What the gateway remembers: sessions, turns, transcripts, windows. Nothing authoritative lives in memory."""
