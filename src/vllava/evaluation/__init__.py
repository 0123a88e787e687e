"""Ask a trained model, score its answers, show them."""
