"""What tests share: harnesses, fakes and clients."""
