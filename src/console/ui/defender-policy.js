// Defender policy: what all Defenders watch. Must never let a version take the place of another that was not shown
// here.

import { get, part, post } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { announce, button, card, check, field, form, page, table, toast, when } from './parts.js';
import { count, nothing } from './words.js';

const MIB = 1024 * 1024;
const MOST = 256;
const OPERATORS = ['admin', 'operator'];
const COLUMNS = [['Version', 'word-column'], ['Set', 'time-column'], ['By', 'user-column'], ['Paths', 'word-column'], ['', 'action-column']];
const PATHS = [['Path', 'wide-column'], ['Watched', 'user-column']];

// The fields of one path; their names end in its number.
function pathFields({ id, path, recursive }, at, drop) {
  const number = at + 1;
  return h('fieldset', { class: 'hook', 'data-key': `path-${id}` },
    h('legend', {}, `Path ${number}`),
    field('File or folder', `path-${id}`, { maxlength: 1024, autocomplete: 'off', spellcheck: 'false', class: 'mono', required: true, value: path }),
    check('All that is below it, too', `below-${id}`, recursive),
    button('Remove', drop, { kind: 'small', 'aria-label': `Remove path ${number}` }));
}

export function open(root, { user }) {
  const may = OPERATORS.includes(user.role);
  // `paths` are those of the editor. `basis`: the version that was in force when it was filled.
  const state = { policy: null, paths: [], basis: 0, shown: null, versions: [], problem: null };
  let next = 0;
  const numbered = (path) => ({ ...path, id: (next += 1) });

  const fill = (policy) => {
    // New numbers: what was typed before does not stay.
    Object.assign(state, { shown: { ...policy, id: (next += 1) }, paths: policy.paths.map(numbered) });
  };
  const save = async (values) => {
    const paths = state.paths.map(({ id }) => ({ path: (values[`path-${id}`] ?? '').trim(), recursive: values[`below-${id}`] === 'on' }));
    const { id } = state.shown;
    const wanted = { paths, perMinute: Number(values[`rate-${id}`]), hashBytes: Math.round(Number(values[`hash-${id}`]) * MIB) };
    const { version } = await post(`/defenders/policy?basis=${state.basis}`, wanted);
    toast(`Version ${version} is in force: all Defenders that are connected have it`);
    await load();
  };
  const add = () => {
    state.paths.push(numbered({ path: '', recursive: true }));
    draw();
    root.querySelector(`[name=path-${next}]`).focus();
  };
  const drop = (path) => () => {
    state.paths = state.paths.filter((other) => other !== path);
    draw();
    root.querySelector('.add').focus();
    announce('Removed: save to confirm');
  };
  const take = async (version) => {
    try {
      fill(await get(`/defenders/policy/versions/${part(String(version))}`));
      draw();
      announce(`The form has version ${version}: save to put it into force again`);
      root.querySelector('h1').scrollIntoView();
    } catch (error) {
      toast(error.message, 'bad');
    }
  };
  function editor() {
    const { shown, paths, basis, policy } = state;
    const { id } = shown;
    const other = shown.version !== policy.version && h('p', { class: 'problem' }, `The form has version ${shown.version}. It is in force again when you save it, as version ${basis + 1}.`);
    return [
      other,
      paths.length === 0 && h('p', { class: 'empty' }, 'Nothing is watched.'),
      form(`Save as version ${basis + 1}`, save, [
        paths.map((path, at) => pathFields(path, at, drop(path))),
        h('p', {}, button('Add a path', add, { kind: 'plain add', disabled: paths.length >= MOST })),
        field('Events of one path within a minute, at most', `rate-${id}`, { type: 'number', min: 1, max: 1000, value: shown.perMinute, 'data-key': `rate-${id}`, hint: 'What is more is held back, counted, and told as one.' }),
        field('Largest file that gets a hash, in MiB', `hash-${id}`, { type: 'number', min: 0, max: 1024, step: 'any', value: shown.hashBytes / MIB, 'data-key': `hash-${id}` }),
      ]),
    ];
  }
  function reader() {
    const { paths, perMinute, hashBytes } = state.policy;
    const rows = paths.map(({ path, recursive }) => ({ key: path, cells: [h('span', { class: 'mono' }, path), recursive ? 'all below' : 'what is in it'] }));
    return [table('Paths', PATHS, rows, 'Nothing is watched.'), h('p', { class: 'quiet foot' }, `At most ${count(perMinute, 'event')} of one path a minute; files up to ${hashBytes / MIB} MiB get a hash.`)];
  }
  function row({ version, time, by, paths }) {
    const force = version === state.policy.version;
    return {
      key: `version-${version}`,
      cells: [
        [String(version), force && h('span', { class: 'quiet' }, ' in force')],
        when(time), by, String(paths),
        may && !force && button('Show in the form', () => take(version), { kind: 'small', 'aria-label': `Show version ${version} in the form` }),
      ],
    };
  }
  function draw() {
    const { policy, versions, problem } = state;
    const known = policy && h('p', { class: 'quiet' }, `Version ${policy.version} is in force.`);
    show(root, page('Defender policy', 'What all Defenders watch. They have another version within a moment, and keep it while no Console answers.',
      problem && h('p', { class: 'problem', role: 'alert' }, problem),
      !policy && !problem && h('p', { class: 'empty' }, nothing(live.stale, false)),
      policy && card('Watched', {}, known, may ? editor() : reader()),
      policy && card('Versions', {}, table('Versions', COLUMNS, versions.map(row), 'Nobody has set one yet.'))));
  }
  async function load() {
    try {
      const policy = await get('/defenders/policy');
      state.versions = await get('/defenders/policy/versions');
      Object.assign(state, { policy, basis: policy.version, problem: null });
      fill(policy);
    } catch (error) {
      state.problem = error.message;
    }
    if (root.isConnected) draw();
  }
  draw();
  load();
  // What somebody may be changing is not loaded again.
  return { draw, load: () => state.policy ?? load() };
}
