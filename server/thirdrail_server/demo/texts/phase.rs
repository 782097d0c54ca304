use std::collections::HashMap;
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    L1,
    L2,
    L3,
}

pub struct Meter {
    readings: HashMap<Phase, Vec<f64>>,
}

impl Meter {
    pub fn mean(&self, phase: Phase) -> Option<f64> {
        let values = self.readings.get(&phase)?;
        match values.len() {
            0 => None,
            n => Some(values.iter().sum::<f64>() / n as f64),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self)
    }
}
