//! Writes families of metrics when the page is scraped.
//!
//! The model of metrics is that of the `prometheus-client` crate, and there is no other: a server
//! has one [`Registry`], on which stand the library's own counters and a [`Collector`] for each
//! part of the process that counts for itself and is read at the scrape. [`EncodeFamilies`] is how
//! a collector writes a family in one statement.
//!
//! Names stand in the code as they stand on the page, so that a search for one finds it; the
//! library wants those of counters without their `_total`, which it writes itself.

use std::fmt;

pub use prometheus_client::collector::Collector;
pub use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::{
    EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, MetricEncoder, NoLabelSet,
    prometheus_text,
};
use prometheus_client::metrics::MetricType;
pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::family::Family;
pub use prometheus_client::metrics::gauge::Gauge;
pub use prometheus_client::registry::Registry;

/// The format of the page, as HTTP names it.
pub const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// Labels of a sample: names and values.
pub type Labels<const N: usize> = [(&'static str, String); N];

/// Holds how often a histogram has met values of each size.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramCounts {
    pub sum: f64,
    /// Upper bounds, the last of which is infinite, and what lies between them: not cumulative.
    pub buckets: Vec<(f64, u64)>,
}

impl HistogramCounts {
    /// Returns what was counted between these bounds, in microseconds, as seconds. The last of
    /// `counts` is what lies past every bound.
    pub fn of_microseconds(bounds: &[u64], counts: &[u64], sum_us: u64) -> Self {
        assert_eq!(counts.len(), bounds.len() + 1, "a count for each bound");
        let bounds = bounds.iter().map(|us| seconds(*us));
        Self {
            sum: seconds(sum_us),
            buckets: bounds
                .chain([f64::INFINITY])
                .zip(counts.iter().copied())
                .collect(),
        }
    }

    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        // Of the counts that were read, not of a counter beside them: more is counted while this is
        // read, and the last bucket must equal the count.
        let count = self.buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(self.sum, count, &self.buckets, None)
    }
}

/// Returns microseconds as Prometheus wants a time.
pub fn seconds(us: u64) -> f64 {
    // Divided: a millionth has no exact double, and bounds times it are labels like 0.0249999...
    us as f64 / 1e6
}

/// Returns the name as the library wants it of a counter.
///
/// # Panics
///
/// Panics if it is not the name of a counter.
pub fn counter_stem(name: &str) -> &str {
    name.strip_suffix("_total")
        .expect("the name of a counter ends in _total")
}

/// Writes families: their help, their type, and their samples.
pub trait EncodeFamilies {
    /// Writes a counter without labels.
    fn counter(&mut self, name: &str, help: &str, value: impl EncodeCounterValue) -> fmt::Result;

    /// Writes a gauge without labels.
    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result;

    /// Writes a counter for each set of labels.
    fn counters<L: EncodeLabelSet, V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result;

    /// Writes a gauge for each set of labels.
    fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result;

    /// Writes a histogram without labels.
    fn histogram(&mut self, name: &str, help: &str, counts: &HistogramCounts) -> fmt::Result;

    /// Writes a histogram for each set of labels.
    fn histograms<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, HistogramCounts)>,
    ) -> fmt::Result;
}

impl EncodeFamilies for DescriptorEncoder<'_> {
    fn counter(&mut self, name: &str, help: &str, value: impl EncodeCounterValue) -> fmt::Result {
        self.encode_descriptor(counter_stem(name), help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        self.encode_descriptor(name, help, None, MetricType::Gauge)?
            .encode_gauge(&value)
    }

    fn counters<L: EncodeLabelSet, V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut family =
            self.encode_descriptor(counter_stem(name), help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut family = self.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in samples {
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, help: &str, counts: &HistogramCounts) -> fmt::Result {
        counts.encode(self.encode_descriptor(name, help, None, MetricType::Histogram)?)
    }

    fn histograms<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, HistogramCounts)>,
    ) -> fmt::Result {
        let mut family = self.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, counts) in samples {
            counts.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Returns the page of all that stands on a registry, in Prometheus' text format 0.0.4.
pub fn page(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_text::encode(&mut text, registry).expect("writing to a string does not fail");
    text
}

/// Returns the families that `write` writes, as a strict reader of the page finds them.
#[cfg(test)]
pub fn written(
    write: impl Fn(&mut DescriptorEncoder<'_>) -> fmt::Result + Send + Sync + 'static,
) -> Vec<quorate_sim::exposition::Family> {
    struct Writes<F>(F);

    impl<F> fmt::Debug for Writes<F> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Writes")
        }
    }

    impl<F> Collector for Writes<F>
    where
        F: Fn(&mut DescriptorEncoder<'_>) -> fmt::Result + Send + Sync + 'static,
    {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            (self.0)(&mut encoder)
        }
    }

    let mut registry = Registry::default();
    registry.register_collector(Box::new(Writes(write)));
    let text = page(&registry);
    quorate_sim::exposition::check(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, types, labels and bounds are what dashboards and alerts are made of.
    #[test]
    fn families_stand_on_the_page_as_they_are_named_in_the_code() {
        #[derive(Debug)]
        struct Everything;

        impl Collector for Everything {
            fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
                encoder.counter("a_total", "Of one.", 7_u64)?;
                encoder.counter("b_seconds_total", "Of a time.", seconds(1_500_000))?;
                encoder.gauge("c_bytes", "Of now.", 1_u64 << 40)?;
                let labels = |text: &str| [("name", text.to_owned())];
                encoder.counters(
                    "d_total",
                    "Of two.",
                    [(labels("x"), 1_u64), (labels("y"), 2)],
                )?;
                encoder.gauges("e", "One \\ two\nthree", [(labels("\"\\\n"), 1.5)])?;
                encoder.gauges::<Labels<1>, u64>("f", "Of none.", [])?;
                let counts = HistogramCounts::of_microseconds(
                    &[100, 2_500, 25_000, 60_000_000],
                    &[1, 2, 0, 0, 1],
                    1_500_000,
                );
                encoder.histograms("g_duration_seconds", "Of times.", [(labels("z"), counts)])
            }
        }

        let mut registry = Registry::default();
        registry.register_collector(Box::new(Everything));
        let expected = r#"# HELP a_total Of one.
# TYPE a_total counter
a_total 7
# HELP b_seconds_total Of a time.
# TYPE b_seconds_total counter
b_seconds_total 1.5
# HELP c_bytes Of now.
# TYPE c_bytes gauge
c_bytes 1099511627776
# HELP d_total Of two.
# TYPE d_total counter
d_total{name="x"} 1
d_total{name="y"} 2
# HELP e One \\ two\nthree
# TYPE e gauge
e{name="\"\\\n"} 1.5
# HELP f Of none.
# TYPE f gauge
# HELP g_duration_seconds Of times.
# TYPE g_duration_seconds histogram
g_duration_seconds_bucket{name="z",le="0.0001"} 1
g_duration_seconds_bucket{name="z",le="0.0025"} 3
g_duration_seconds_bucket{name="z",le="0.025"} 3
g_duration_seconds_bucket{name="z",le="60"} 3
g_duration_seconds_bucket{name="z",le="+Inf"} 4
g_duration_seconds_sum{name="z"} 1.5
g_duration_seconds_count{name="z"} 4
"#;
        assert_eq!(page(&registry), expected);
    }
}
