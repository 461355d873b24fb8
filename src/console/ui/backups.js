// Manage > System > Backup & Restore: the backups of all members, and manual ones of this member. Must never restore
// unless the name was typed, and never let the name of a folder act as a part of the command that is shown.

import { Problem, get, list, part, patch, post, remove } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, check, confirm, copyButton, field, form, page, table, toast, when } from './parts.js';
import { bytes, nothing, time } from './words.js';

const ROWS = 1000;
// Milliseconds between two requests for the state of a job.
const PACE = 1_000;
const COLUMNS = [['Name', 'user-column'], ['Member'], ['Kind'], ['Made', 'time-column'], ['Version'], ['Size'], ['', 'action-column']];

function rename(backup, reload) {
  const content = field('New name', 'name', { value: backup.name, maxlength: 64, autocomplete: 'off' });
  return confirm(`Rename ${backup.name}`, content, 'Rename', async ({ name }) => {
    await patch(`/backups/${part(backup.id)}`, name);
    await reload();
  });
}

function drop(backup, reload) {
  const content = h('p', {}, 'The file is deleted. After that, its content can only be restored from other backups.');
  return confirm(`Delete ${backup.name}?`, content, 'Delete', async () => {
    await remove(`/backups/${part(backup.id)}`);
    await reload();
  }, { kind: 'danger' });
}

// Quotes a text as one word of a shell command.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

// Asks first, and then begins a restore. The Console closes soon after the answer, and everybody has to log in again.
function restore(backup, { folder, encrypted }, reload) {
  const command = `sudo twistcli restore ${quoted(`${folder}/${backup.id}`)}`;
  const { version } = live.status ?? {};
  const other = version && version !== backup.version;
  const open = encrypted && !backup.encrypted;
  const content = [
    other && h('p', { class: 'problem' }, `Version ${backup.version} made it, and only the same version restores it: this Console is ${version}.`),
    h('ul', {},
      h('li', {}, 'The backup is checked first: nothing changes if it is damaged', backup.encrypted && ' or the key of BACKUP_KEY_FILE is not its own', '.'),
      h('li', {}, 'The Console is closed, and the database of all members is replaced.'),
      h('li', {}, h('strong', {}, `All that was written since ${time(backup.time)} is lost.`)),
      h('li', {}, 'Everybody has to log in again, with the passwords of that time.')),
    open && check('It is not encrypted, and I know who made it', 'unencrypted', false),
    h('p', {}, 'To do the same on the host of the PRIMARY, run:'),
    h('div', { class: 'join-line' }, h('code', { id: 'restore-command' }, command), copyButton(command)),
  ];
  return confirm(`Restore ${backup.name}?`, content, 'Restore', async ({ unencrypted }) => {
    await post(`/backups/${part(backup.id)}/restore`, { confirm: backup.id, unencrypted: Boolean(unencrypted) });
    toast(`${backup.name} is checked, and then restored: the Console closes meanwhile`);
    await reload();
  }, { kind: 'danger', typed: backup.name });
}

// What can be done with a backup here. One of another member can only be used on that member.
function actions(backup, here, reload, { verify, restoring }) {
  if (backup.node && backup.node !== here) return h('span', {}, `on ${backup.node}: sudo twistcli backup`);
  const named = (text) => `${text} ${backup.name}`;
  const small = (text, work) => button(text, work, { kind: 'small', 'aria-label': named(text) });
  return h('div', { class: 'actions' },
    h('a', { class: 'button small', href: `/api/v1/backups/${part(backup.id)}`, download: true, 'aria-label': named('Download') }, 'Download'),
    small('Check', () => verify(backup)),
    small('Restore …', () => restoring(backup)),
    backup.kind === 'manual' && small('Rename', () => rename(backup, reload)),
    small('Delete', () => drop(backup, reload)));
}

function row(backup, here, reload, work) {
  return {
    key: `${backup.node ?? ''}/${backup.id}`,
    cells: [
      h('strong', {}, backup.name),
      backup.node ?? here,
      backup.encrypted ? `${backup.kind}, encrypted` : backup.kind,
      when(backup.time),
      backup.version,
      bytes(backup.bytes),
      actions(backup, here, reload, work),
    ],
  };
}

// How complete the copies at BACKUP_URL are.
function copied({ url, running, problem, complete }) {
  if (running) return `${url}: ${running.id}, ${bytes(running.done)} of ${bytes(running.total)}`;
  if (problem) return `${url}: not complete: ${problem}`;
  return complete ? [`${url}: complete at `, time(complete)] : url;
}

// What another member has, according to its answer to the last request.
function had({ node, problem, backups, newest, folder, enabled }) {
  if (problem) return [node, h('span', { class: 'problem' }, `unknown: ${problem}`)];
  const count = `${backups} in ${folder}`;
  return [node, [count, newest && [', the newest of ', time(newest)], !enabled && '; automatic backups are off']];
}

// What is under way, what was last done, and what comes next.
function facts({ running, last, next, folder, free, enabled, encrypted, copies, members = [] }) {
  const lines = [
    ['Folder', folder],
    ['Free space', free === null || free === undefined ? '–' : bytes(free)],
    ['Automatic backups', enabled ? ['on; the next one ', next ? time(next) : 'soon'] : 'off (DATA_RECOVERY_ENABLED)'],
    ['New backups', encrypted ? 'encrypted (BACKUP_KEY_FILE)' : 'not encrypted'],
    copies && ['Copies', copied(copies)],
    last && ['Last', [time(last.time), ' ', last.ok ? '' : 'failed: ', last.text]],
    ...members.slice(1).map(had),
  ].filter(Boolean);
  const label = running && `${running.id}: ${running.step}`;
  return [
    running && h('p', {}, label, h('progress', { max: Math.max(1, running.total), value: running.done, 'aria-label': label })),
    h('dl', { class: 'facts' }, lines.map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)])),
  ];
}

export function open(root) {
  const state = { backups: null, settings: null, problem: null };
  let timer = 0;
  const make = async ({ name }, element) => {
    const goes = await watched(post('/backups', name));
    element.reset();
    toast(goes ? `Backup ${name} is being made` : `Backup ${name} is made`);
  };
  // Shows the progress of a job meanwhile. Returns true if the job goes on after the answer.
  const watched = async (work) => {
    timer = setTimeout(load, PACE / 2);
    try {
      const { number } = await work;
      await load();
      const { running, last } = state.settings ?? {};
      // The job ended between the answer and this request.
      if (last?.number === number && !last.ok) throw new Problem(409, last.text);
      return running?.number === number;
    } catch (error) {
      await load();
      throw error;
    }
  };
  const verify = async (backup) => {
    try {
      const goes = await watched(post(`/backups/${part(backup.id)}/verify`));
      toast(goes ? `${backup.name} is still being checked: the result is shown here` : `${backup.name} is sound`);
    } catch (error) {
      toast(error.message, 'bad');
    }
  };
  const creating = () => form('Back up now', make, field('Name', 'name', { maxlength: 64, autocomplete: 'off', required: true }));
  function draw() {
    const here = live.status?.name ?? 'this member';
    const silent = (state.settings?.members ?? []).filter(({ problem }) => problem).map(({ node }) => node).join(', ');
    const empty = state.problem ?? nothing(live.stale, state.backups,
      silent ? `There is no backup on the members that answer. What ${silent} has is unknown.` : 'There is no backup on any member.');
    const rows = (state.backups ?? []).map((backup) => row(backup, here, load, { verify, restoring: (one) => restore(one, state.settings ?? {}, load) }));
    const restoring = h('p', {}, 'A restore replaces the whole database, on all members, and closes the Console while it does. A backup of the ',
      'same version is needed', state.settings?.encrypted && ', and its key', '. If nobody can log in any more, twistcli can do it on the host of the PRIMARY.');
    show(
      root,
      page(
        'Backup & Restore',
        [
          state.settings?.enabled && 'This member backs up its own copy every day, and keeps daily, weekly and monthly backups. ',
          state.settings && !state.settings.enabled && 'Automatic backups are off on this member. ',
          `Each member keeps its own backups. Those of ${here}, which is PRIMARY, can be used from here.`,
        ],
        h('div', { class: 'columns' },
          card('Manual backup', {}, creating()),
          state.settings && card('State', {}, facts(state.settings))),
        card('Backups', {}, table('Backups', COLUMNS, rows, empty)),
        card('Restore', {}, restoring),
      ),
    );
  }
  async function load() {
    clearTimeout(timer);
    try {
      state.backups = (await list('/backups', ROWS)).rows;
      state.settings = await get('/settings/backup');
      state.problem = null;
    } catch (error) {
      state.problem = error.status === 404 ? 'This version makes no backups.' : error.message;
    }
    if (!root.isConnected) return;
    draw();
    if (state.settings?.running) timer = setTimeout(load, PACE);
  }
  draw();
  load();
  return { draw, load, close: () => clearTimeout(timer) };
}
