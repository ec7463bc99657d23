"""What leaves a run: an adapter, a merged model, a converted checkpoint."""
