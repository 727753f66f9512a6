//! What a restore is of: writers and components of a set, and what they depend on.
//!
//! Called by `backup`. It reads documents of sets alone; nobody is asked here.

use crate::error::Error;
use crate::protocol::{Need, SetPreRestore};
use crate::snapshot::document::{SetDocument, WriterRecord};
use guest_agent_wire::components::RestoreComponent;
use guest_agent_wire::host::{WriterComponents, WriterRestore};

/// Each writer of a set with its components, their stamps, and what it stored with them. One that wants no restore events gets none,
/// unless it is named.
pub(super) fn what_to_restore(document: &SetDocument, what: &SetPreRestore) -> Vec<WriterRestore> {
    let is_all = what.writers.is_empty() && what.components.is_empty();
    let in_scope = document.writers.iter().filter(|record| record.in_scope);
    in_scope
        .filter_map(|record| {
            let mut components = names(document, record);
            let is_named = what.writers.iter().any(|name| record.is_called(name));
            let is_whole = is_named || (is_all && record.wants_restore_events());
            if !is_whole {
                let picked: Vec<_> = picked_of(&what.components, record).collect();
                components.retain(|component| picked.contains(component));
                if components.is_empty() {
                    return None;
                }
            }
            Some(WriterRestore {
                writer: record.instance_id.clone(),
                components: components
                    .into_iter()
                    .map(|component| restore_component(record, component, what))
                    .collect(),
            })
        })
        .collect()
}

fn restore_component(
    record: &WriterRecord,
    (logical_path, name): Name,
    what: &SetPreRestore,
) -> RestoreComponent {
    let mut said = record.components().iter();
    let said = said.find(|said| said.logical_path == logical_path && said.name == name);
    RestoreComponent {
        stamp: said.and_then(|said| said.stamp.clone()),
        metadata: said.map(|said| said.metadata.clone()).unwrap_or_default(),
        additional_restores: what.additional_restores,
        options: what.options.clone(),
        logical_path,
        name,
        ..RestoreComponent::default()
    }
}

/// What components depend on that is not restored with them, by their writers' documents.
pub(super) fn what_it_needs(document: &SetDocument, restored: &[WriterRestore]) -> Vec<Need> {
    let record_of = |writer: &str| {
        let mut records = document.writers.iter();
        records.find(|record| record.instance_id == writer)
    };
    let mut needs = Vec::new();
    for writer in restored {
        let described = record_of(&writer.writer).and_then(WriterRecord::metadata);
        let described = described.map_or(&[][..], |metadata| &metadata.components);
        let is_restored = |path: &str, name: &str| {
            let mut components = writer.components.iter();
            components.any(|one| one.logical_path == path && one.name == name)
        };
        for component in described {
            if !is_restored(&component.logical_path, &component.name) {
                continue;
            }
            for other in &component.dependencies {
                let is_other =
                    |path: &str, name: &str| path == other.logical_path && name == other.name;
                let is_there = restored.iter().any(|writer| {
                    let record = record_of(&writer.writer);
                    record.is_some_and(|record| record.is_called(&other.class_id))
                        && writer
                            .components
                            .iter()
                            .any(|one| is_other(&one.logical_path, &one.name))
                });
                if is_there {
                    continue;
                }
                let mut records = document.writers.iter().filter(|record| record.in_scope);
                let holder = records.find(|record| {
                    record.is_called(&other.class_id)
                        && names(document, record)
                            .iter()
                            .any(|(path, name)| is_other(path, name))
                });
                let holder_name = holder.map_or(&other.class_id, |record| &record.instance_id);
                needs.push(Need {
                    component: shown(&writer.writer, &component.logical_path, &component.name),
                    needs: shown(holder_name, &other.logical_path, &other.name),
                    is_in_set: holder.is_some(),
                });
            }
        }
    }
    needs
}

/// Logical path and name of a component.
type Name = (String, String);

/// A component in the form in which it is picked.
fn shown(writer: &str, logical_path: &str, name: &str) -> String {
    if logical_path.is_empty() {
        format!("{writer}={name}")
    } else {
        format!("{writer}={logical_path}/{name}")
    }
}

/// Those of a writer among components that were picked.
fn picked_of(picked: &[WriterComponents], record: &WriterRecord) -> impl Iterator<Item = Name> {
    let of_writer = picked
        .iter()
        .filter(|picked| record.is_called(&picked.writer));
    of_writer
        .flat_map(|picked| &picked.components)
        .map(|picked| (picked.logical_path.clone(), picked.name.clone()))
}

/// A component that the set does not have cannot be restored from it.
pub(super) fn check_restorable(
    document: &SetDocument,
    wanted: &[WriterComponents],
) -> Result<(), Error> {
    let in_scope = || document.writers.iter().filter(|record| record.in_scope);
    for wanted in wanted {
        for one in &wanted.components {
            let name = (one.logical_path.clone(), one.name.clone());
            let mut called = in_scope().filter(|record| record.is_called(&wanted.writer));
            if called.any(|record| names(document, record).contains(&name)) {
                continue;
            }
            let there: Vec<String> = in_scope()
                .flat_map(|record| {
                    let names = names(document, record).into_iter();
                    names.map(|(path, name)| shown(&record.instance_id, &path, &name))
                })
                .collect();
            let there = match there.as_slice() {
                [] => "none".to_owned(),
                all => all.join(", "),
            };
            return Err(Error::NotFound(format!(
                "set {} has no component {}; it has: {there}",
                document.set,
                shown(&wanted.writer, &name.0, &name.1)
            )));
        }
    }
    Ok(())
}

/// Logical paths and names of a writer's components in a set: those picked, or all.
fn names(document: &SetDocument, record: &WriterRecord) -> Vec<Name> {
    let picked: Vec<_> = picked_of(&document.request.components, record).collect();
    if !picked.is_empty() {
        return picked;
    }
    record
        .metadata()
        .into_iter()
        .flat_map(|metadata| &metadata.components)
        .map(|component| (component.logical_path.clone(), component.name.clone()))
        .collect()
}
