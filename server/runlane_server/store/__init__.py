"""Where lanes, transcripts and events are kept. A store holds no rule."""
