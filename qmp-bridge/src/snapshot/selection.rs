//! Which components of a writer may be picked, and which come along, by where they stand in its document.
//!
//! Pure; called by `run::window` before the guest is asked to prepare, and by `sets::backup` before a restore. VSS's rules ("Working with
//! Selectability and Logical Paths"): a component stands below another whose path and name its own logical path begins with.
//!
//! * Backup: a component is picked by name. What stands below it comes with it, unnamed: its writer knows that. One that is not `selectable`
//!   cannot be picked if a selectable one stands above it; if none does, it is picked whenever its writer takes part.
//! * Restore: what was picked for the backup can be restored by name, what came with it only if it is `selectable_for_restore`: the one that
//!   it came with is restored then, of that the part alone.

use guest_agent_wire::components::SelectedComponent;
use guest_agent_wire::metadata::Component;
use std::collections::BTreeMap;

/// Logical path and name of a component.
pub type Name = (String, String);

/// A component that cannot be picked by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("component {component} cannot be picked alone: it comes with {with}")]
pub struct ComesWith {
    /// Path and name in one.
    pub component: String,
    /// What to pick instead.
    pub with: String,
}

/// A component to restore, and of it these parts alone, if any are named (path and name in one).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The component.
    pub of: Name,
    /// The parts; none: all of it.
    pub parts: Vec<String>,
}

/// What a requester must pick with `picked` of the same writer, which are not empty: what is neither selectable nor comes with another.
///
/// # Errors
/// One of `picked` comes with another and cannot be picked. One that the document does not have passes: its writer refuses it.
pub fn must_come(
    components: &[Component],
    picked: &[&SelectedComponent],
) -> Result<Vec<SelectedComponent>, ComesWith> {
    let is_picked = |component: &Component| {
        let mut picked = picked.iter();
        picked.any(|one| one.logical_path == component.logical_path && one.name == component.name)
    };
    let mut must_come = Vec::new();
    for component in components.iter().filter(|component| !component.selectable) {
        match selectable_above(components, component) {
            Some(with) if is_picked(component) => {
                return Err(ComesWith {
                    component: whole(component),
                    with: whole(with),
                });
            }
            None if !is_picked(component) => must_come.push(SelectedComponent {
                logical_path: component.logical_path.clone(),
                name: component.name.clone(),
                previous_stamp: None,
            }),
            Some(_) | None => {}
        }
    }
    Ok(must_come)
}

/// The components that stand for all of a writer: those that do not merely come with another.
pub fn all(components: &[Component]) -> impl Iterator<Item = &Component> {
    components.iter().filter(|component| {
        component.selectable || selectable_above(components, component).is_none()
    })
}

/// Whether a component is restored with those, itself or with one above it.
pub fn is_with<'a>(
    component: &Component,
    names: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> bool {
    names.into_iter().any(|(path, name)| {
        (path == component.logical_path && name == component.name)
            || stands_below(component, &joined(path, name))
    })
}

/// What to restore for the components that are named `wanted`, of a backup for which `picked` were picked. A name that is neither picked
/// nor in the document is passed over.
///
/// # Errors
/// One came with another, and its writer cannot restore it alone.
pub fn to_restore(
    components: &[Component],
    picked: &[Name],
    wanted: &[Name],
) -> Result<Vec<Part>, ComesWith> {
    let mut restored: BTreeMap<&Name, Vec<String>> = BTreeMap::new();
    let (whole_ones, parts): (Vec<_>, Vec<_>) =
        wanted.iter().partition(|name| picked.contains(name));
    for name in parts {
        let Some(component) = find(components, name) else {
            continue;
        };
        // The nearest one: it knows its part best.
        let above = picked
            .iter()
            .filter(|above| stands_below(component, &joined(&above.0, &above.1)))
            .max_by_key(|above| joined(&above.0, &above.1).len());
        let Some(above) = above else {
            continue;
        };
        if !component.selectable_for_restore {
            return Err(ComesWith {
                component: whole(component),
                with: joined(&above.0, &above.1),
            });
        }
        restored.entry(above).or_default().push(whole(component));
    }
    // All of it has the part in it.
    restored.extend(whole_ones.into_iter().map(|name| (name, Vec::new())));
    let in_order = picked.iter().filter_map(|name| {
        let parts = restored.remove(name)?;
        Some(Part {
            of: name.clone(),
            parts,
        })
    });
    Ok(in_order.collect())
}

/// The component of a name.
pub fn find<'a>(components: &'a [Component], name: &Name) -> Option<&'a Component> {
    let mut components = components.iter();
    components.find(|one| (&one.logical_path, &one.name) == (&name.0, &name.1))
}

/// Path and name in one.
pub fn joined(logical_path: &str, name: &str) -> String {
    if logical_path.is_empty() {
        name.to_owned()
    } else {
        format!("{logical_path}/{name}")
    }
}

fn whole(component: &Component) -> String {
    joined(&component.logical_path, &component.name)
}

fn stands_below(component: &Component, above: &str) -> bool {
    let rest = component.logical_path.strip_prefix(above);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The nearest selectable component above another.
fn selectable_above<'a>(components: &'a [Component], below: &Component) -> Option<&'a Component> {
    components
        .iter()
        .filter(|above| above.selectable && stands_below(below, &whole(above)))
        .max_by_key(|above| whole(above).len())
}

#[cfg(test)]
mod tests;
