//! Random numbers for the load: cheap, and the same from the same seed.

use std::fmt;
use std::str::FromStr;

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a number from 0 on, below `bound`, which is above 0. The bias of the multiplication
    /// is below 2^-32 for what is used here.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert_ne!(bound, 0);
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// Returns a number from 0 on, below 1.
    pub fn fraction(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The probability of each key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Distribution {
    Uniform,
    /// Key number n with a probability in proportion to 1 / (n + 1)^theta.
    Zipfian(f64),
}

/// YCSB's constant.
const THETA_DEFAULT: f64 = 0.99;

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=').unwrap_or((text, "")) {
            ("uniform", "") => Ok(Distribution::Uniform),
            ("zipfian", "") => Ok(Distribution::Zipfian(THETA_DEFAULT)),
            ("zipfian", theta) => match theta.parse::<f64>() {
                Ok(theta) if theta > 0.0 && theta < 1.0 => Ok(Distribution::Zipfian(theta)),
                _ => Err("theta is above 0 and below 1".into()),
            },
            _ => Err("expected uniform, zipfian or zipfian=THETA".into()),
        }
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Distribution::Uniform => f.write_str("uniform"),
            Distribution::Zipfian(theta) => write!(f, "zipfian={theta}"),
        }
    }
}

/// Draws key numbers. Zipfian by the method of Gray et al., "Quickly Generating Billion-Record
/// Synthetic Databases" (1994), as in YCSB.
#[derive(Debug, Clone)]
pub enum KeyChooser {
    Uniform {
        keys: u64,
    },
    Zipfian {
        keys: u64,
        theta: f64,
        alpha: f64,
        zeta: f64,
        eta: f64,
    },
}

impl KeyChooser {
    /// Takes time in proportion to `keys` for a zipfian one: make it once and clone it.
    pub fn new(distribution: Distribution, keys: u64) -> Self {
        match distribution {
            Distribution::Uniform => KeyChooser::Uniform { keys },
            Distribution::Zipfian(theta) => {
                let zeta: f64 = (1..=keys).map(|rank| (rank as f64).powf(-theta)).sum();
                let zeta_2 = 1.0 + 0.5f64.powf(theta);
                let eta = (1.0 - (2.0 / keys as f64).powf(1.0 - theta)) / (1.0 - zeta_2 / zeta);
                KeyChooser::Zipfian {
                    keys,
                    theta,
                    alpha: 1.0 / (1.0 - theta),
                    zeta,
                    eta,
                }
            }
        }
    }

    pub fn choose(&self, rng: &mut Rng) -> u64 {
        match *self {
            KeyChooser::Uniform { keys } => rng.below(keys),
            KeyChooser::Zipfian {
                keys,
                theta,
                alpha,
                zeta,
                eta,
            } => {
                let u = rng.fraction();
                let uz = u * zeta;
                if uz < 1.0 {
                    return 0;
                }
                if uz < 1.0 + 0.5f64.powf(theta) {
                    return 1.min(keys - 1);
                }
                let rank = (keys as f64 * (eta * u - eta + 1.0).powf(alpha)) as u64;
                rank.min(keys - 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(distribution: Distribution, keys: u64, draws: u64) -> Vec<u64> {
        let (chooser, mut rng) = (KeyChooser::new(distribution, keys), Rng::new(7));
        let mut counts = vec![0; keys as usize];
        (0..draws).for_each(|_| counts[chooser.choose(&mut rng) as usize] += 1);
        counts
    }

    #[test]
    fn uniform_hits_every_key_alike() {
        let counts = counts(Distribution::Uniform, 10, 100_000);
        assert!(
            counts.iter().all(|count| (9_000..11_000).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn zipfian_falls_off_as_it_should() {
        let counts = counts(Distribution::Zipfian(0.99), 1000, 200_000);
        let zeta: f64 = (1..=1000).map(|rank| f64::from(rank).powf(-0.99)).sum();
        for rank in [0usize, 1] {
            let expected = 200_000.0 * ((rank + 1) as f64).powf(-0.99) / zeta;
            assert!(
                (counts[rank] as f64 / expected - 1.0).abs() < 0.05,
                "rank {rank}: {} of {expected}",
                counts[rank]
            );
        }
        let halves = (
            counts[..500].iter().sum::<u64>(),
            counts[500..].iter().sum::<u64>(),
        );
        assert!(halves.0 > 5 * halves.1 && halves.1 > 0, "{halves:?}");
        assert_eq!(
            super::tests::counts(Distribution::Zipfian(0.5), 1, 10),
            [10]
        );
    }

    #[test]
    fn distributions_parse() {
        assert_eq!("zipfian".parse(), Ok(Distribution::Zipfian(0.99)));
        assert_eq!("zipfian=0.5".parse(), Ok(Distribution::Zipfian(0.5)));
        for bad in ["zipfian=1", "zipfian=x", "normal", "uniform=1"] {
            assert!(bad.parse::<Distribution>().is_err(), "{bad}");
        }
    }
}
