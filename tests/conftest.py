from hypothesis import settings

# A first call into PyTorch can take a second; time is not what these tests are about.
settings.register_profile("kdnb", deadline=None)
settings.load_profile("kdnb")
