// Tags: named, coloured labels. A small page, which proves that writes reach the cluster.

import { list, part, post, put, remove } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, confirm, field, form, page, table } from './parts.js';
import { nothing } from './words.js';

const ROWS = 1000;
const COLUMNS = [['Tag'], ['Description', 'wide-column'], ['', 'action-column']];

function fields(tag) {
  return [
    field('Name', 'name', { maxlength: 128, required: true, autocomplete: 'off', value: tag?.name }),
    field('Colour', 'color', { type: 'color', value: tag?.color || '#2e7d6b' }),
    field('Description', 'description', { maxlength: 1024, autocomplete: 'off', value: tag?.description }),
  ];
}

function change(tag, reload) {
  return confirm(`Change ${tag.name}`, fields(tag), 'Change', async ({ name, color, description }) => {
    await put(`/tags/${part(tag.name)}`, { name, color, description });
    await reload();
  });
}

function drop(tag, reload) {
  return confirm(`Delete ${tag.name}?`, h('p', {}, 'The tag is deleted.'), 'Delete', async () => {
    await remove(`/tags/${part(tag.name)}`);
    await reload();
  }, { kind: 'danger' });
}

function row(tag, reload, may) {
  const named = (text) => `${text} ${tag.name}`;
  return {
    key: tag.name,
    cells: [
      h('span', { class: 'tag' }, h('span', { class: 'swatch', swatch: tag.color, 'aria-hidden': 'true' }), tag.name),
      tag.description,
      may && h('div', { class: 'actions' },
        button('Change', () => change(tag, reload), { kind: 'small', 'aria-label': named('Change') }),
        button('Delete', () => drop(tag, reload), { kind: 'small', 'aria-label': named('Delete') })),
    ],
  };
}

export function open(root, { user }) {
  const may = ['admin', 'operator'].includes(user.role);
  const state = { tags: null, problem: null };
  const add = async ({ name, color, description }, element) => {
    await post('/tags', { name, color, description });
    element.reset();
    await load();
  };
  const adding = () => form('Add', add, fields());
  function draw() {
    const empty = state.problem ?? nothing(live.stale, state.tags, 'There is no tag yet.');
    const rows = (state.tags ?? []).map((tag) => row(tag, load, may));
    show(root, page('Tags', null, may && card('Add a tag', {}, adding()), card('All tags', {}, table('Tags', COLUMNS, rows, empty))));
  }
  async function load() {
    try {
      state.tags = (await list('/tags', ROWS)).rows;
      state.problem = null;
    } catch (error) {
      state.problem = error.message;
    }
    draw();
  }
  draw();
  load();
  return { draw, load };
}
