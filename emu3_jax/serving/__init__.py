"""The server: many requests share one model. `batcher` computes, `app` speaks HTTP, `page` is what a browser shows."""
