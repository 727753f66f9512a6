//! A snapshot set from intent to document: the bridge's heart. COORDINATION.md is its normative text.
//!
//! Pure rooms: [`level`], [`plan`], [`witness`], [`document`], [`selection`]. Acting rooms: [`run`] makes a set, [`undo`] takes one back
//! (also that of a dead bridge), [`intent`] keeps the records. [`step`] names the steps.

pub mod document;
pub mod intent;
pub mod level;
pub mod plan;
pub mod run;
pub mod selection;
pub mod step;
pub mod undo;
pub mod witness;
